"""How adapter files are spelled; one file a format."""
