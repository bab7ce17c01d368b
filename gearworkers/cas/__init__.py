"""The content-addressed store: one immutable file per distinct content, shared by all layers."""
