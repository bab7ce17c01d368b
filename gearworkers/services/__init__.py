"""Programs that run beside the gateway."""
