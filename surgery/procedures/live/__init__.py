"""Live: adapters laid over a model in memory, run, merged into it, saved and taken out."""
