"""gearworkers: a storage driver for Docker and containerd that stores every distinct file once per host."""
