"""Images in registries and archives: read them, and convert them to Gear images."""
