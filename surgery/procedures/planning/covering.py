"""Covering: which weights a form holds where a merge goes into it, so that loaders find what config.json says."""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch

from surgery.codecs import FORMS, torchao
from surgery.codecs.methods import LISTED_PLAINLY
from surgery.core.site import Site, TensorInfo
from surgery.errors import ConfigError, FormatError, MatchError, UsageError, printable
from surgery.hosts.change import Change
from surgery.hosts.encoded import held_in, made_as
from surgery.hosts.packing import quantization_of
from surgery.ops.linear import Linear
from surgery.procedures.places.tying import vocabulary
from surgery.procedures.planning.draft import Draft

_HALVES = (torch.float32, torch.bfloat16, torch.float16)
_WEIGHT = ".weight"


def cover(draft: Draft, form: str, plainly: Collection[str] = ()) -> None:
    """The weights that loaders take for quantized ones go into `form`, adapted or not, but for those of `plainly`.

    Where no model tells which these are, the linear maps that the adapters change. MatchError where there are none.
    """
    held = [name for name, one in draft.base.packed.items() if one.form == form]
    if held:
        raise UsageError(
            f"`into={form}`: {printable(held[0])} is held so already; `into=keep` keeps its scales, `into=16bit` "
            "writes it plainly"
        )
    modules, others = _modules(draft, form, plainly)
    covered = [info for info in draft.base.weights() if info.name in modules]
    for info in covered:
        change = draft.changes.get(info.name) or Change(Site(info.name, {"weight": info}), info.torch_dtype)
        refused = list(_refusals(change, form))
        draft.refusals += refused
        draft.changes[info.name] = change if refused else held_in(change, form)
    if not covered:
        left = " but those that would keep too little there" if plainly else ""
        raise MatchError(
            f"`into={form}`: {printable(draft.base.path)} has no linear weight{left} that it could hold; "
            "leave `into` out"
        )
    draft.notes.append(f"{len(covered)} weights are held in {form}; linear ones that are not: {len(others)}")
    codec, settings = FORMS[form]
    draft.quantization = codec.told(settings, draft.changes[covered[0].name].dtype, others)


def leave_plain(draft: Draft) -> None:
    """Let config.json tell which weights of a quantized base, that keeps its format, are written plainly now."""
    base, told = draft.base, quantization_of(draft.base.config)
    plainly = [name for name, change in draft.changes.items() if name in base.packed and not change.keep]
    if not plainly or not told or draft.refusals:
        return
    key = _list_of_plain(told)
    if key is None:
        draft.refusals.append(
            FormatError(
                f"{printable(base.path)}: held by {printable(told.get('quant_method'))}, in which single weights are "
                "not known to be left plain; give `into=16bit`, or leave `fallback` out"
            )
        )
        return
    called, linears = base.called(), base.linears()
    here = {_module(called(info.name)) for info in base.weights() if _is_matrix(info) and info.name not in base.packed}
    skipped = {*(told.get(key) or here), *(() if linears is None else linears.others)}
    draft.quantization = {**told, key: sorted(skipped | {_module(called(name)) for name in plainly})}


def can_leave_plain(config: Mapping[str, Any]) -> bool:
    """Does the format that a base is held in, by its config.json, let single weights be written plainly?"""
    return _list_of_plain(quantization_of(config)) is not None


def _list_of_plain(told: Mapping[str, Any]) -> str | None:
    """The key of a quantization_config under which modules are listed that are left plain.

    None of torchao's, whose headers tell of each weight besides.
    """
    method = str(told.get("quant_method"))
    return None if method == torchao.METHOD else LISTED_PLAINLY.get(method)


def _modules(draft: Draft, form: str, plainly: Collection[str]) -> tuple[set[str], list[str]]:
    """The weights to cover, all that fit into the form, and the other linear modules as they are called in memory."""
    base, linears, called = draft.base, draft.base.linears(), draft.base.called()
    matrices = {info.name: _module(called(info.name)) for info in base.weights() if _is_matrix(info)}
    fit = {info.name for info in base.weights() if info.name in matrices and _fits(form, info)} - {*plainly}
    chosen = {name for name, module in matrices.items() if linears is not None and module in linears.quantized}
    if linears is None or not chosen:
        maps = {name for name, change in draft.changes.items() if _is_linear_map(change)}
        chosen = (fit & maps) - vocabulary(base).keys()
        return chosen, sorted(module for name, module in matrices.items() if name not in chosen)
    chosen &= fit
    return chosen, sorted((linears.quantized | linears.others) - {matrices[name] for name in chosen})


def _is_linear_map(change: Change) -> bool:
    site = change.site
    linear = site.op is not None and site.op.name == Linear.name and bool(change.layers)
    return linear and _is_matrix(site.weight) and change.origin == site


def _fits(form: str, info: TensorInfo) -> bool:
    """Do its sizes? Groups of inputs have to be whole, and there is no scale of nothing."""
    if not all(info.shape):
        return False
    try:
        made_as(form, info.shape, torch.bfloat16)
    except ConfigError:
        return False
    return True


def _is_matrix(info: TensorInfo) -> bool:
    return len(info.shape) == 2 and info.name.endswith(_WEIGHT) and isinstance(info.dtype, torch.dtype)


def _module(name: str) -> str:
    return name.removesuffix(_WEIGHT)


def _refusals(change: Change, form: str) -> Iterator[FormatError]:
    name = printable(change.site.weight.name)
    if change.new:
        yield FormatError(f"{name}: the base has none of this shape, and {form} is for those it has; leave `into` out")
    dtype = str(change.dtype).removeprefix("torch.")
    if change.dtype not in _HALVES:
        yield FormatError(f"{name}: it is in {dtype}, which {form} is not made from; give `dtype=bfloat16`")
    elif made_as(form, change.site.weight.shape, change.dtype).dtype not in {None, change.dtype}:
        yield FormatError(f"{name}: it is in {dtype}, and {form} is always read as bfloat16; give `dtype=bfloat16`")
