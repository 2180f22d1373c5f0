"""Tied copies: PEFT's `ensure_weight_tying`, under which copies of tied modules are one weight, as the modules are."""

from collections.abc import Collection, Iterable, Mapping

from torch import Tensor
from torch.nn import Parameter

from surgery.core.config import AdapterConfig
from surgery.errors import MatchError, printable
from surgery.layers import Replaced
from surgery.procedures.places.model_tree import Tree

Saved = Mapping[str, Mapping[str, Tensor] | None]


def with_tied_copies(tree: Tree, config: AdapterConfig, adapted: Iterable[str], saved: Saved) -> Saved:
    """Besides, the modules that hold a weight of one that is copied. MatchError where one of them is adapted."""
    if not config.ties():
        return saved
    tied = {other: name for name in saved for other in tree.tied_to(name)}
    for name in adapted:
        if name in tied:
            raise MatchError(
                f"{printable(name)}: ensure_weight_tying, and its weight is tied to {printable(tied[name])}, of which "
                "modules_to_save holds a copy; leave it out of target_modules, or untie them first"
            )
    return {**dict.fromkeys(tied), **saved}


def tie_copies(tree: Tree, adapter: str, saved: Collection[str]) -> None:
    """Let what two originals share be shared by their copies."""
    held: dict[int, Parameter] = {}
    for name in saved:
        holder = tree.modules[name]
        assert isinstance(holder, Replaced)
        for path, original in holder.original.named_parameters():
            owner, _, own = path.rpartition(".")
            inside = holder.copies[adapter].get_submodule(owner)
            mine = inside._parameters[own]
            assert mine is not None
            inside._parameters[own] = held.setdefault(id(original), mine)
