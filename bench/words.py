"""How figures are told, and where."""

from collections.abc import Iterable, Sequence
from pathlib import Path


def times(ratio: float) -> str:
    """How many times faster."""
    return f"{ratio:.1f} x faster" if ratio >= 1 else f"{1 / ratio:.1f} x slower"


def ms(seconds: float) -> str:
    value = 1e3 * seconds
    return f"{value:.0f} ms" if value >= 100 else f"{value:.1f} ms"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """In Markdown."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows))


def put_between(page: Path, marks: tuple[str, str], text: str) -> None:
    """`text` in place of what stands between the two marks of a page."""
    before, _, rest = page.read_text().partition(marks[0])
    page.write_text(f"{before}{marks[0]}\n{text}\n{marks[1]}{rest.partition(marks[1])[2]}")
