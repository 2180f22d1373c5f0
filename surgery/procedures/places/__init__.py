"""Places: where adapters go, in a model's modules and in a base's weights."""
