"""How figures are told."""


def times(ratio: float) -> str:
    """How many times faster."""
    return f"{ratio:.1f} x faster" if ratio >= 1 else f"{1 / ratio:.1f} x slower"
