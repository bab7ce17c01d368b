"""gearworkers: the engine of a Docker storage driver that stores every distinct file once per host."""
