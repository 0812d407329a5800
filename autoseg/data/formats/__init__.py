"""Image files: one file a format."""
