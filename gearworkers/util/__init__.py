"""Helpers that know nothing of layers or images: files, processes, addresses, system calls."""
