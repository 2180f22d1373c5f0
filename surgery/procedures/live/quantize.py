"""quantize: the linear layers of a live model become bitsandbytes' own, in place."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from surgery.codecs.bitsandbytes_config import OUTLIERS
from surgery.core.names import suffix_hits
from surgery.core.select import refuse_unmatched
from surgery.errors import EnvironmentFault, MatchError, StateError, UsageError, ValueRangeError, printable
from surgery.hosts.bitsandbytes_layers import never_round_scales
from surgery.hosts.tree import state_of
from surgery.procedures.places.model_tree import Tree

BITS = {"nf4": 4, "fp4": 4, "int8": 8}
HEAD = "lm_head"


@dataclass(frozen=True)
class Quantization:
    """What becomes of each layer. `compute_dtype` None: the dtype that its weight has."""

    kind: str
    compute_dtype: torch.dtype | None = None
    double_quant: bool = False

    def __post_init__(self) -> None:
        if self.kind not in BITS:
            raise UsageError(f"quantize: {printable(self.kind)!r}; one of {', '.join(BITS)} is wanted")
        if BITS[self.kind] == 8 and (self.double_quant or self.compute_dtype is not None):
            raise UsageError(
                "quantize: compute_dtype and double_quant are of 4 bits; int8 computes in what comes in, and has one "
                "scale a row; leave them out"
            )


def quantize(
    root: nn.Module, wanted: Quantization, skip: Sequence[str] | None, heads: Collection[str] = ()
) -> Sequence[str]:
    """Quantize every nn.Linear but those within `skip`, by default the output heads; returns those left out.

    Nothing changes unless all can be: MatchError for an entry that hits nothing, where nothing is left, and for a
    tied weight; StateError where adapters are, and for a weight on the meta device; ValueRangeError.
    """
    bitsandbytes = import_bitsandbytes("quantize")
    if state_of(root) is not None:
        raise StateError("quantize: the model has adapters; quantize it first, or eject")
    tree = Tree(root)
    linear = [name for name, module in tree.modules.items() if type(module) is nn.Linear]
    skipped = {name for name in linear if _is_skipped(name, skip, heads)}
    refuse_unmatched("skip", [one for one in skip or () if not _hits(one, tree.modules)], tree.modules)
    chosen = list(dict.fromkeys(tree.first_name(name) for name in linear if name not in skipped))
    if not chosen:
        raise MatchError("quantize: the model has no nn.Linear but what is skipped; name other modules in skip")
    _refuse(tree, chosen)
    for name in chosen:
        module = tree.modules[name]
        made = _made(bitsandbytes.nn, module, wanted)
        for place in tree.aliases[id(module)]:
            place.parent._modules[place.key] = made
    return sorted(skipped)


def import_bitsandbytes(what: str) -> Any:
    """EnvironmentFault where it is missing or broken."""
    try:
        import bitsandbytes
    except (ImportError, OSError, RuntimeError) as error:
        raise EnvironmentFault(f"{what}: bitsandbytes is missing or broken; pip install bitsandbytes") from error
    return bitsandbytes


def _is_skipped(name: str, skip: Sequence[str] | None, heads: Collection[str]) -> bool:
    if skip is None:
        return name in heads or name.rpartition(".")[2] == HEAD
    return any(_hits(one, [name]) for one in skip)


def _hits(entry: str, names: Collection[str]) -> bool:
    """Is one of `names` the module that `entry` names, or inside it?"""
    return any(suffix_hits((entry,), part) for name in names for part in _outwards(name))


def _outwards(name: str) -> Iterator[str]:
    """A path, and those of what it lies in."""
    while name:
        yield name
        name = name.rpartition(".")[0]


def _refuse(tree: Tree, chosen: Sequence[str]) -> None:
    """An error for what would be lost, or cannot be held."""
    owners: dict[int, set[int]] = {}
    for owner in tree.root.modules():
        for values in owner._parameters.values():
            owners.setdefault(id(values), set()).add(id(owner))
    for name in chosen:
        module: Any = tree.modules[name]
        if "weight" not in module._parameters or module._forward_hooks or module._forward_pre_hooks:
            raise StateError(
                f"{printable(name)}: it has hooks, or a weight that is computed, which would be lost; remove them "
                "first, or skip it"
            )
        if len(owners[id(module.weight)]) > 1:
            raise MatchError(f"{printable(name)}: its weight is tied to another module's; untie them, or skip it")
        if module.weight.is_meta:
            raise StateError(f"{printable(name)}: it is on the meta device; give the model its weights first")
        largest = module.weight.detach().abs().amax() if module.weight.numel() else torch.zeros(())
        if not float(largest) <= torch.finfo(torch.float16).max or module.weight.dtype == torch.float64:
            raise ValueRangeError(
                f"{printable(name)}: its weight is in float64, or beyond the range of float16; bitsandbytes holds "
                "neither; cast it, or skip it"
            )


def _made(layers: Any, module: Any, wanted: Quantization) -> nn.Module:
    """The layer of bitsandbytes that stands for an nn.Linear."""
    sizes, device = (module.in_features, module.out_features, module.bias is not None), module.weight.device
    if BITS[wanted.kind] == 8:
        made = layers.Linear8bitLt(*sizes, has_fp16_weights=False, threshold=OUTLIERS, device="meta")
        codes = layers.Int8Params(module.weight.detach().cpu(), requires_grad=False, has_fp16_weights=False)
    else:
        options = {"compress_statistics": wanted.double_quant, "quant_type": wanted.kind}
        compute_dtype = wanted.compute_dtype or module.weight.dtype
        made = layers.Linear4bit(*sizes, compute_dtype=compute_dtype, device="meta", **options)
        codes = layers.Params4bit(module.weight.detach(), requires_grad=False, module=made, **options)
    made.weight, made.bias = codes.to(device), module.bias
    never_round_scales(made)
    found: nn.Module = made.train(module.training)
    return found
