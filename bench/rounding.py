"""Writes the table of roundings in docs/quantization.md: what is left of a delta by the base's own scales.

python -m bench.rounding
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from bench.formats import PAGE, SIZE, weight
from bench.words import put_between, table
from surgery.codecs import FORMS
from surgery.core.codec import Codec, Packed
from surgery.core.feedback import Feedback
from surgery.core.survival import Survival

MARKS = "<!-- roundings: written by `python -m bench.rounding` -->", "<!-- end of roundings -->"
HEAD = ("format", "delta", "rounding", "retained", "noise", "output error / effect", "the same, inputs half along A")
FORMATS, SHARES, RANK, INPUTS = ("nf4", "fp8_block"), (0.01, 0.03, 0.06, 0.1), 16, 1024


def main() -> None:
    told = table(HEAD, rows())
    put_between(PAGE, MARKS, told)
    print(told)


def rows() -> Iterator[list[str]]:
    for form in FORMATS:
        codec, settings = FORMS[form]
        packed = codec.fresh(weight(), settings)
        for share in SHARES:
            yield from _rows(form, codec, packed, share)


def _rows(form: str, codec: Codec, packed: Packed, share: float) -> Iterator[list[str]]:
    drawn = torch.Generator().manual_seed(1)
    before = codec.decode(packed, torch.float64)
    A, B = (torch.randn(RANK, SIZE, generator=drawn, dtype=torch.float64) for _ in "AB")
    delta = B.T @ A
    delta *= share * before.norm() / delta.norm()
    near = codec.encode(before + delta, like=packed)
    held = codec.decode(near, torch.float64)
    fed = Feedback.along(A).choose(before + delta, held, *codec.grid(near))
    white = torch.randn(SIZE, INPUTS, generator=drawn, dtype=torch.float64)
    span = torch.linalg.qr(A.T)[0]  # [in, r]
    half = white + (SIZE / RANK) ** 0.5 * span @ (span.T @ white)
    for rounding, found in (("nearest", held), ("feedback", fed)):
        told = Survival.of(before, before + delta, found)
        errors = [_relative(found - before - delta, delta, inputs) for inputs in (white, half)]
        figures = (told.retained, told.noise, *errors)
        yield [form, f"{share:.0%}", rounding, *(f"{one:.3g}" for one in figures)]


def _relative(error: Tensor, delta: Tensor, inputs: Tensor) -> float:
    return float((error @ inputs).norm() / (delta @ inputs).norm())


if __name__ == "__main__":
    main()
