"""Docker's graphdriver plugin protocol."""
