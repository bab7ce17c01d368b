"""The `gear` command."""
