"""Exports: a model with its adapters in another format, and the proof that it computes the same."""
