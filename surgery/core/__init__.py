"""The contracts, each beside the values it speaks of; imports nothing else of surgery but the errors."""
