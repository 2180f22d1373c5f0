"""Merge and unmerge LoRA in a live decoder of 1.1B parameters, against peft's merge_adapter and unmerge_adapter.

Ours are exact, keep what brings the weights back, and hash them before and after; peft's are a product and a sum. What
comes back is told as well.
"""

import json
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import peft
import torch
from torch import Tensor

import surgery
from bench.step import FIELDS, decoder
from bench.thin import middle, seconds, shuffle_adapters
from bench.words import ms

ROUNDS, SIZE = 2, "1.1B"


class Took(NamedTuple):
    """Seconds, and which part of all weights was the same to the bit after the first unmerge."""

    merge: float
    unmerge: float
    back: float


def main() -> None:
    theirs = peft.get_peft_model(decoder(SIZE), peft.LoraConfig(**FIELDS))
    by_peft = timed(theirs, theirs.merge_adapter, theirs.unmerge_adapter)
    del theirs
    ours = surgery.inject(decoder(SIZE), surgery.LoraConfig(**FIELDS))
    index = timed(ours, partial(surgery.merge, ours), partial(surgery.unmerge, ours))
    copies = timed(ours, partial(surgery.merge, ours, undo="copy"), partial(surgery.unmerge, ours))
    print(json.dumps([*rows("", index, by_peft), *rows(', undo="copy"', copies, by_peft)]))


def timed(model: Any, merge: Callable[[], object], unmerge: Callable[[], object]) -> Took:
    shuffle_adapters(model)
    before = bases(model)
    merge()
    unmerge()
    back = same(before, bases(model))
    took = [(seconds(merge), seconds(unmerge)) for _ in range(ROUNDS)]
    return Took(middle([one for one, _ in took]), middle([one for _, one in took]), back)


def bases(model: Any) -> list[Tensor]:
    return [values.detach().clone() for name, values in model.named_parameters() if "base_layer" in name]


def same(before: list[Tensor], after: list[Tensor]) -> float:
    equal = sum(int((a.view(torch.int16) == b.view(torch.int16)).sum()) for a, b in zip(before, after, strict=True))
    return equal / sum(values.numel() for values in before)


def rows(how: str, ours: Took, theirs: Took) -> list[list[str]]:
    return [
        row(f"live merge of a {SIZE} bf16 decoder{how}", ours.merge, theirs.merge),
        row(f"unmerge it{how}", ours.unmerge, theirs.unmerge),
        [f"weights that are then as before{how}", f"{ours.back:.2%}", f"{theirs.back:.2%}", "", "100%"],
    ]


def row(what: str, ours: float, theirs: float) -> list[str]:
    return [what, ms(ours), ms(theirs), f"{ours / theirs:.1f}", ""]


if __name__ == "__main__":
    main()
