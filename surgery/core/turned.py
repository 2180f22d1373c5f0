"""Turned: the factors of an output head whose weight is an embedding's, where the embedding has such factors.

Its delta is the other's, transposed: (B A)^T = A^T B^T, so that the weight that both hold changes once. Whatever else a
method has, such as the values between the two, stands between them still.
"""

import torch

from surgery.core.method import Params
from surgery.core.op import Op

EMBEDDING = "embedding"


def turned(of: Params) -> Params:
    """A is B^T and B is A^T, over the same memory."""
    return {**of, "A": of["B"].mT, "B": of["A"].mT}


def tied(op: Op, of: Params) -> Params:
    """The factors of a layer that acts by `op`, where an embedding that holds the same weight has `of`."""
    return of if op.name == EMBEDDING else turned(of)


def is_turned(params: Params, of: Params) -> bool:
    """Are these the factors of `of`, turned?"""
    return {"A", "B"} <= of.keys() and is_same(params, turned(of))


def is_tied(op: Op, params: Params, of: Params) -> bool:
    """Are these what `tied` gives?"""
    return is_same(params, of) if op.name == EMBEDDING else is_turned(params, of)


def is_same(params: Params, of: Params) -> bool:
    """Are both the same tensors?"""
    return params.keys() == of.keys() and all(
        params[role].shape == values.shape and torch.equal(params[role], values) for role, values in of.items()
    )
