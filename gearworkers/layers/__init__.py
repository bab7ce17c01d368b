"""Layers: made, filled from a tar, turned into a tar, compared, removed."""
