"""The contracts, each beside the values it speaks of; imports nothing but torch and the errors."""
