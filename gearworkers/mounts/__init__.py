"""Overlay mounts, mountinfo, project quotas, and checks of the kernel."""
