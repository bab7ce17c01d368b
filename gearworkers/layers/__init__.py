"""Layers: their life in a GEAR_ROOT, their indexes and their diffs.

`store` creates, publishes and removes layers; `apply` fills one from a tar; `index` and `diff` are packages. A layer
with missing objects is *incomplete* (`incomplete`); a *private* layer shares no objects (`private`).
"""
