"""Overlay mounts, the system calls under them, and what this kernel can do."""
