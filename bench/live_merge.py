"""Merge and unmerge LoRA in a live decoder of 1.1B parameters, against peft's merge_adapter and unmerge_adapter.

Ours are exact, keep what brings the weights back, and hash them before and after; peft's are one product and one sum.
What comes back is told as well.
"""

import json
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import peft
import torch
from torch import Tensor

import surgery
from bench.step import FIELDS, decoder
from bench.thin import middle, seconds, shuffle_adapters
from bench.words import ms

ROUNDS, SIZE = 3, "1.1B"


class Took(NamedTuple):
    """Seconds, and which part of all weights was the same to the bit after an unmerge."""

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
    times: Mapping[str, list[float]] = {"merge": [], "unmerge": []}
    before = bases(model)
    for _ in range(ROUNDS + 1):  # the first warms up
        times["merge"].append(seconds(merge))
        times["unmerge"].append(seconds(unmerge))
    return Took(*(middle(one[1:]) for one in times.values()), same(before, bases(model)))


def bases(model: Any) -> list[Tensor]:
    return [values.detach().clone() for name, values in model.named_parameters() if "base_layer" in name]


def same(before: list[Tensor], after: list[Tensor]) -> float:
    equal = sum(int((a.view(torch.int16) == b.view(torch.int16)).sum()) for a, b in zip(before, after, strict=True))
    return equal / sum(values.numel() for values in before)


def rows(how: str, ours: Took, theirs: Took) -> list[list[str]]:
    return [
        [
            f"live merge of a 1.1B bf16 decoder{how}",
            ms(ours.merge),
            ms(theirs.merge),
            ratio(ours.merge, theirs.merge),
            "",
        ],
        [f"unmerge it{how}", ms(ours.unmerge), ms(theirs.unmerge), ratio(ours.unmerge, theirs.unmerge), ""],
        [f"weights that are then as before{how}", f"{ours.back:.2%}", f"{theirs.back:.2%}", "", "100%"],
    ]


def ratio(ours: float, theirs: float) -> str:
    return f"{ours / theirs:.2f}"


if __name__ == "__main__":
    main()
