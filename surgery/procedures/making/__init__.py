"""Making: adapters out of others, or out of two models."""
