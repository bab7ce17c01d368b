"""Layer diffs: the changes of a layer as a list or as a tar."""
