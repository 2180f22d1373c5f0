"""resize: a base with as many tokens as an adapter was trained with."""

from typing import Any

import torch
from torch import nn

from surgery.core.adapter import Adapter
from surgery.errors import MatchError, printable


def resize(model: Any, adapter: Adapter) -> None:
    """Give embedding and head as many rows as the adapter's own have, and what it has copies of, as they are there.

    MatchError where rows for its tokens are in neither. A base of that size already stays as it is.
    """
    places = _places(model)
    given = {name: values for name, values in {**adapter.copies, **adapter.saved}.items() if name in places}
    sizes = {name: len(values) for name, values in given.items() if len(values) != len(places[name].weight)}
    if not sizes:
        return
    rows = max(sizes.values())
    model.resize_token_embeddings(rows, mean_resizing=False)
    resized = _places(model)
    there = {id(resized[name].weight) for name in sizes}
    for name, module in resized.items():
        if id(module.weight) not in there:
            raise MatchError(
                f"{printable(adapter.where)}: it was trained with {rows} tokens, and {printable(name)} of the base has "
                f"{len(places[name].weight)}; rows for the others are in neither; save the adapter with it"
            )
    with torch.no_grad():
        for name in sizes.keys() & adapter.copies.keys():
            resized[name].weight.copy_(adapter.copies[name])


def _places(model: Any) -> dict[str, Any]:
    """The embedding of tokens and the head, by the names of their weights."""
    ends = [one for one in (model.get_input_embeddings(), model.get_output_embeddings()) if one is not None]
    plain = {id(one) for one in ends if isinstance(one, nn.Embedding | nn.Linear)}
    return {f"{name}.weight": module for name, module in model.named_modules() if id(module) in plain}
