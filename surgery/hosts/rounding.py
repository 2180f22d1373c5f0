"""Rounding: which of the codes of a format a merged weight gets, by the scales that it has."""

import torch
from torch import Tensor

from surgery.core.adapter import Started
from surgery.core.codec import Codec, Packed
from surgery.core.feedback import Feedback
from surgery.hosts.change import Change, importance_of

FED_ELEMENTS = 1 << 21  # of a weight at a time: with fewer rows the steps from column to column would take the time


def feedback_of(change: Change, started: Started) -> Feedback | None:
    """None where the nearest codes are asked for, or nothing tells which inputs matter."""
    return importance_of(change, started) if change.feedback else None


def rounded(codec: Codec, laid: Tensor, like: Packed, feedback: Feedback | None) -> Packed:
    """`laid` [rows, in] (float64) by the scales of `like`."""
    near = codec.encode(laid, like=like)
    if feedback is None:
        return near
    chosen = feedback.choose(laid, codec.decode(near, torch.float64), *codec.grid(near))
    return codec.encode(chosen, like=near)
