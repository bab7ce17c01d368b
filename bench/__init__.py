"""Benchmarks of gearworkers against Docker's overlay2: the same dockerd and the same disk, measured in turns."""
