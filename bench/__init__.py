"""gearworkers beside Docker's overlay2: the same dockerd, the same disk, in turns."""
