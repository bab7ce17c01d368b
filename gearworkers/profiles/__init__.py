"""Start-up profiles: which files a container opens when it starts, recorded once and fetched ahead of time."""
