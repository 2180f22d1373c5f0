"""outputs: the base with adapters over it and a merged model, both run by transformers, and how far they agree.

Both run in float64, so that what parts them is the merge; the noise floor is that of the merged model's own dtype.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

from surgery.core.adapter import Weighted
from surgery.core.agreement import Agreements, Outputs, compare, floors
from surgery.core.distance import Distance
from surgery.errors import CheckError, InputError, UsageError, ValueRangeError, printable
from surgery.hosts.checkpoint import Checkpoint
from surgery.hosts.packing import quantization_of
from surgery.hosts.tree import adapted_layers
from surgery.integrations.transformers.example_inputs import arguments, example_inputs
from surgery.integrations.transformers.loading import Wanted, class_of, read_model
from surgery.integrations.transformers.quiet import quiet
from surgery.io.hub import Located
from surgery.io.weight_files import INDEX, SINGLE
from surgery.procedures.checking.exactly import as_merged
from surgery.procedures.checking.outputs import Given, Inputs, mask_of, narrow_run, run, widened
from surgery.procedures.live.fitting import fit
from surgery.procedures.live.load import fitting_of
from surgery.procedures.live.switch import disable_adapters, set_adapter
from surgery.procedures.places.model_tree import Tree

Run = TypeVar("Run")

# Both runs are in float64 by the same kernels, and part by the rounding of the merged weights alone, which is about
# that of the linears' inputs: one of several that make the floor. Some merges round the delta first, and then the
# sum: 2. The largest of some errors may be twice as far out as the largest of others: 2. Right merges into
# all-MiniLM-L6-v2, by us and by peft, lie within 0.5 floors in float32 and bfloat16. Of an adapter whose effect is 5%
# of the outputs, two of 12 sites were left out in turn: both lie 15,000 floors off and more in float32; in bfloat16
# one lies 5 off, and the other shows at its own layer alone.
# What the grid of exact merges does is more than rounding does where an adapter dwarfs its base, and a model whose
# attention is saturated makes more of either than of another noise; but both are known of an exact merge, so that
# nothing is allowed for them: of 48 right merges into tiny models by LoRA and DoRA, alpha from 4 to 4096, 4 lie 5 to 17
# floors off what is ideal.
_FACTOR = 4


class Adapted(NamedTuple):
    """What the base gives with the adapters over it and without them, in float64, and where these lie."""

    given: Inputs
    true: Given
    base: Outputs
    paths: Collection[str]


class Merged(NamedTuple):
    """What the merged model gives in float64, the noise floors of its dtype, and which its parameters have."""

    found: Outputs
    floor: Mapping[str, Distance]
    dtypes: Mapping[str, torch.dtype]


def agreements(
    base: Checkpoint, adapters: Sequence[Weighted], out: Checkpoint, inputs: Inputs | None, layers: bool
) -> Agreements:
    """Compare the outputs of `adapters` over `base` with those of `out`, which is read as a plain model.

    One model is in memory at a time. Raises EnvironmentFault without transformers, InputError for what it cannot
    load, UsageError for a model whose inputs cannot be made from its config.
    """
    with quiet() as transformers:
        kind = class_of(transformers, _folder(out), adapters[0].adapter)
        known = _run_adapted(base, adapters, kind, inputs, layers)
        rows = mask_of(known.given)
        merged = _run_merged(out, kind, known)
        true: Outputs = {
            name: one for name, one in known.true.outputs.items() if name in merged.found or name[:6] != "layer "
        }
        told = compare(true, merged.found, merged.floor, known.base, rows, _FACTOR)
        if not told.ok:  # seldom, so that the two runs more are not always made
            true = _as_merged(true, _adapted(base, adapters, kind), known, merged.dtypes)
            floor = (
                merged.floor if all(_tells(one) for one in merged.floor.values()) else _wider(out, kind, known, merged)
            )
            told = told.settled(compare(true, merged.found, floor, known.base, rows, _FACTOR))
    return replace(told, left_out=known.true.left_out)


def refuse_uncompared(base: Checkpoint, out: Checkpoint) -> None:
    """InputError where the outputs of one of them are not compared, before anything is read."""
    if quantization_of(out.config):
        raise InputError(
            f"{printable(out.path)}: it is quantized; outputs are compared of plain models only; give `probes=16` "
            "instead of `outputs`, which tells how far its codes move those of each layer"
        )
    if quantization_of(base.config):
        raise InputError(
            f"{printable(base.path)}: it is quantized; outputs are compared of plain models only; leave `outputs` "
            "out: all that the adapter changes is derived and graded without"
        )
    _folder(base)
    _folder(out)


def _run_merged(out: Checkpoint, kind: Any, known: Adapted) -> Merged:
    model = _loaded(out, kind, adapters=())
    dtypes = {name: one.dtype for name, one in model.named_parameters(remove_duplicate=False)}
    narrow, part = _tried(model, known.given, lambda: narrow_run(model, known.given, known.paths))
    found = run(model.double(), widened(known.given), known.paths).outputs
    floor = floors(narrow, found, mask_of(known.given))
    return Merged(found, {name: one.scaled(part) for name, one in floor.items()}, dtypes)


def _tells(floor: Distance) -> bool:
    return floor.error * _FACTOR < 1


def _wider(out: Checkpoint, kind: Any, known: Adapted, merged: Merged) -> Mapping[str, Distance]:
    """The floors of a run of the same weights in float32, of which what routes to experts by a hair switches none.

    It is fewer errors that they allow: the rounding of the weights is not among them, and is known of an exact merge.
    """
    model = _loaded(out, kind, adapters=()).float()
    narrow = run(model, widened(known.given, torch.float32), known.paths).outputs
    return floors(narrow, merged.found, mask_of(known.given))


def _as_merged(true: Outputs, model: nn.Module, known: Adapted, dtypes: Mapping[str, torch.dtype]) -> Outputs:
    """What is right of an exact merge; of factors that have none, `true` itself."""
    try:
        wide = widened(known.given)
        return as_merged(true, model.double(), lambda model: run(model, wide, known.paths).outputs, dtypes)
    except ValueRangeError:
        return true


def _adapted(base: Checkpoint, adapters: Sequence[Weighted], kind: Any) -> nn.Module:
    model = _loaded(base, kind, adapters)
    _lay(model, adapters)
    return model


def _run_adapted(
    base: Checkpoint, adapters: Sequence[Weighted], kind: Any, inputs: Inputs | None, layers: bool
) -> Adapted:
    model = _adapted(base, adapters, kind)
    given = example_inputs(model) if inputs is None else inputs
    model.double()
    paths = tuple(adapted_layers(model)) if layers else ()
    wide = widened(given)
    true = _tried(model, given, lambda: run(model, wide, paths))
    with disable_adapters(model):
        return Adapted(given, true, run(model, wide, paths).outputs, paths)


def _tried(model: nn.Module, given: Inputs, call: Callable[[], Run]) -> Run:
    """The outcome of a run. UsageError where the model does not take its inputs."""
    try:
        return call()
    except (RuntimeError, TypeError, ValueError, AttributeError, LookupError) as error:
        if isinstance(error, RuntimeError) and "memory" in str(error):
            raise
        raise UsageError(
            f"{type(model).__name__}: it does not run on {', '.join(arguments(given))}: {printable(error)}; its "
            f"forward takes {', '.join(arguments(model))}; in Python, verify_checkpoint(..., inputs={{...}}) gives them"
        ) from error


def _lay(model: nn.Module, adapters: Sequence[Weighted]) -> None:
    """Each over those before it, as strongly as it is wanted."""
    for index, (adapter, weight) in enumerate(adapters):
        tree = Tree(model)
        fitting = fitting_of(tree, adapter)
        fit(tree, str(index), fitting if weight == 1 else fitting.weighted(weight), trainable=False)
    set_adapter(model, [str(index) for index in range(len(adapters))])


def _loaded(place: Checkpoint, kind: Any, adapters: Sequence[Weighted]) -> nn.Module:
    """The model at a place, in its dtype. CheckError or InputError where a weight is lacking that no adapter brings."""
    folder = _folder(place)
    first = adapters[0].adapter if adapters else None
    try:
        model, missing = read_model(Located(folder), Wanted(kind), first)
    except (RuntimeError, ValueError, OSError, LookupError) as error:
        if isinstance(error, RuntimeError) and "ignore_mismatched_sizes" not in str(error):
            raise
        raise InputError(
            f"{printable(folder)}: transformers cannot load it: {printable(error)}; `surgery diff` may say why"
        ) from error
    brought = {name for one in adapters for name in one.adapter.saved}
    lacking = sorted(name for name in missing if name not in brought)
    if lacking:
        raise (InputError if adapters else CheckError)(
            f"{printable(folder)}: it has no {printable(lacking[0])}, which a {type(model).__name__} would have at "
            "random; a whole model is wanted"
        )
    run_experts_singly(model)
    return model


def run_experts_singly(model: Any) -> None:
    """Where a model of transformers has experts: its grouped products take no float64."""
    can = getattr(model, "_can_set_experts_implementation", None)
    if can is not None and can():
        model.set_experts_implementation("eager")


def _folder(place: Checkpoint) -> Path:
    """Where transformers finds just these weights. InputError for what it would read otherwise."""
    if "config.json" not in {path.name for path in place.folder.iterdir()}:
        raise InputError(f"{printable(place.path)}: no config.json beside it; a whole model folder is wanted to run it")
    if not place.path.is_dir() or (place.index is None and place.files[0].path.name != SINGLE):
        raise InputError(f"{printable(place.path)}: a folder with {SINGLE} or {INDEX} is wanted to run it")
    return place.folder
