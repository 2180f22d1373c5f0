"""The public functions: on a model in memory, and on files."""
