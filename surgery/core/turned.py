"""Turned: the factors of an output head whose weight is an embedding's, where the embedding has such factors.

Its delta is the other's, transposed: (B A)^T = A^T B^T, so that the weight that both hold changes once.
"""

import torch

from surgery.core.method import Params


def turned(of: Params) -> Params:
    """A is B^T and B is A^T, over the same memory."""
    return {"A": of["B"].mT, "B": of["A"].mT}


def is_turned(params: Params, of: Params) -> bool:
    """Are these the factors of `of`, turned?"""
    if not params.keys() == of.keys() == {"A", "B"}:
        return False
    return all(
        params[role].shape == values.shape and torch.equal(params[role], values) for role, values in turned(of).items()
    )
