"""Model files: bounded readers that load no weights."""
