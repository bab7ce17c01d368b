"""Layer diffs: from a container's upper directory, or from a committed layer, back to a tar."""
