"""Prints how the inputs of the zoo end: `python tests/hostile/tally.py [FILE.json]`, which takes the counts."""

import json
import sys
import tempfile
from collections import Counter
from pathlib import Path

from forked import Cost, merge_forked
from merging import sound
from zoo import ZOO


def ending(cost: Cost, code: int) -> str:
    if cost.code is None:
        return "hung"
    return {(3, 3): "refused", (0, 0): "handled"}.get((cost.code, code), "wrong")


def tally() -> Counter[str]:
    """One line for each input that ends otherwise than it must, and the sums, which are returned."""
    found, slowest, largest = Counter[str](), 0.0, 0
    for name, (_, code) in ZOO.items():
        with tempfile.TemporaryDirectory() as folder:
            cost = merge_forked(sound(Path(folder)), name)
        found[ending(cost, code)] += 1
        slowest, largest = max(slowest, cost.seconds), max(largest, cost.grown_bytes)
        if ending(cost, code) in ("hung", "wrong"):
            print(f"{name!a}: {cost}, {code} is wanted")
    print(f"{len(ZOO)} inputs:", ", ".join(f"{found[one]} {one}" for one in ("refused", "handled", "wrong", "hung")))
    print(f"slowest {slowest:.2f} s of processor time; largest peak {largest / 1e6:.0f} MB beyond the start")
    return found


if __name__ == "__main__":
    counts = tally()
    for path in sys.argv[1:]:
        Path(path).write_text(json.dumps({f"inputs {ending}": count for ending, count in counts.items()}))
    sys.exit(int(counts["wrong"] + counts["hung"] > 0))
