"""Images as registries and archives hold them: read, converted to Gear images, inspected."""
