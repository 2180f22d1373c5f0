"""Drawn places: where in a weight an adapter has numbers of which no file tells; the seed does, as in PEFT."""

from collections.abc import Mapping
from functools import lru_cache

import torch
from torch import Tensor

from surgery.core.site import Site
from surgery.errors import ConfigError, MatchError, printable, quoted
from surgery.methods.acts_on import only_linear_or_conv1d
from surgery.methods.field_values import check_count, check_counts, check_number, check_whole


def check_fields(count: object, scaling: object, seed: object, pattern: object) -> None:
    """ConfigError for what n_frequency, scaling, random_loc_seed and n_frequency_pattern cannot be."""
    check_count("n_frequency", count)
    check_number("scaling", scaling)
    check_whole("random_loc_seed", seed, -(1 << 63), (1 << 64) - 1)
    if not isinstance(pattern, Mapping):
        raise ConfigError(f"n_frequency_pattern is {quoted(pattern)}; a table is wanted")
    check_counts("n_frequency_pattern", pattern)


def check_room(site: Site, method: str, count: int) -> None:
    """MatchError where the site's weight is no matrix, or has no room for so many numbers."""
    only_linear_or_conv1d(site, method)
    out_features, in_features = site.shape
    if count > out_features * in_features:
        raise MatchError(
            f"{printable(site.name)}: n_frequency is {count}, and its weight has {out_features * in_features} numbers; "
            "choose a smaller one by n_frequency_pattern, or exclude it"
        )


def place_bytes(shape: tuple[int, int]) -> int:
    """What drawing takes: of all places, each an int64, some are chosen."""
    return 8 * shape[0] * shape[1]


def places(c: Tensor, seed: int, shape: tuple[int, int]) -> Tensor:
    """[2, count]: rows and columns of the numbers c in a matrix of this shape, drawn by PEFT's call of torch."""
    if torch.compiler.is_compiling():
        found: Tensor = _node(c.detach(), str(seed), *shape)
        return found
    return _places(seed, len(c), shape, c.device)


@torch.library.custom_op("surgery::places", mutates_args=())
def _node(c: Tensor, seed: str, out_features: int, in_features: int) -> Tensor:
    """The same in a compiled graph, which cannot draw; a seed may be longer than an int of torch."""
    return _places(int(seed), len(c), (out_features, in_features), c.device).clone()


@_node.register_fake
def _(c: Tensor, seed: str, out_features: int, in_features: int) -> Tensor:  # noqa: ARG001  # its shape alone
    return c.new_empty(2, len(c), dtype=torch.int64)


@lru_cache(maxsize=64)
def _places(seed: int, count: int, shape: tuple[int, int], device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # they outlive it
        drawn = torch.randperm(shape[0] * shape[1], generator=torch.Generator("cpu").manual_seed(seed), device="cpu")
        flat = drawn[:count]
        return torch.stack([flat // shape[1], flat % shape[1]]).to(device)


def one_of_each(group: Tensor) -> list[Tensor]:
    """The indices of all, in order, in as many parts as the largest group has members; each has one of a group."""
    order = torch.argsort(group, stable=True)
    first = torch.searchsorted(group[order], group[order])
    turn = torch.arange(len(group), device=group.device) - first
    ends = torch.bincount(turn).cumsum(0).tolist()
    order = order[torch.argsort(turn, stable=True)]
    return [order[start:end] for start, end in zip([0, *ends], ends, strict=False)]
