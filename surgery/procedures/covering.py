"""Covering: which weights a form holds where a merge goes into it, so that loaders find what config.json says."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from surgery.codecs.bnb8 import OUTLIERS
from surgery.codecs.fp8_block import BLOCK
from surgery.core.site import Site, TensorInfo
from surgery.errors import FormatError, MatchError, UsageError, printable
from surgery.hosts.change import Change
from surgery.hosts.checkpoint import Checkpoint
from surgery.hosts.packing import Held, quantization_of
from surgery.ops.linear import Linear
from surgery.procedures.draft import Draft
from surgery.procedures.tying import vocabulary

_HALVES = (torch.float32, torch.bfloat16, torch.float16)
_WEIGHT = ".weight"


_PLAIN = {  # where each kind of quantization_config lists the modules that are held plainly
    "bitsandbytes": "llm_int8_skip_modules",
    "fp8": "modules_to_not_convert",
    "compressed-tensors": "ignore",
}


def cover(draft: Draft, form: str, plainly: Collection[str] = ()) -> None:
    """The weights that loaders take for quantized ones go into `form`, adapted or not, but for those of `plainly`.

    Where no model tells which these are, the linear maps that the adapters change. MatchError where there are none.
    """
    held = [name for name, one in draft.base.packed.items() if form_of(one) == form]
    if held:
        raise UsageError(
            f"into {form}: {printable(held[0])} is held so already; into 'keep' keeps its scales, '16bit' writes it "
            "plainly"
        )
    modules, others = _modules(draft, plainly)
    covered = [info for info in draft.base.weights() if info.name in modules]
    for info in covered:
        change = draft.changes.get(info.name) or Change(Site(info.name, {"weight": info}), info.torch_dtype)
        refused = list(_refusals(change, form))
        draft.refusals += refused
        draft.changes[info.name] = change if refused else replace(change, into=form)
    if not covered:
        left = " but those that would keep too little there" if plainly else ""
        raise MatchError(
            f"into {form}: {printable(draft.base.path)} has no linear weight{left} that it could hold; give into 16bit"
        )
    draft.notes.append(f"{len(covered)} weights are held in {form}, and {len(others)} other linear ones are not")
    draft.quantization = quantization(form, draft.changes[covered[0].name].dtype, others)


def leave_plain(draft: Draft) -> None:
    """Let config.json tell which weights of a quantized base, that keeps its format, are written plainly now."""
    base, told = draft.base, quantization_of(draft.base.config)
    plainly = [name for name, change in draft.changes.items() if name in base.packed and not change.keep]
    if not plainly or not told or draft.refusals:
        return
    key = _PLAIN.get(str(told.get("quant_method")))
    if key is None:
        draft.refusals.append(
            FormatError(
                f"{printable(base.path)}: held by {printable(told.get('quant_method'))}, in which single weights are "
                "not known to be left plain; merge into 16bit, or without fallback"
            )
        )
        return
    rename, linears = base.names().rename, base.linears()
    here = {_module(rename(info.name)) for info in base.weights() if _is_matrix(info) and info.name not in base.packed}
    skipped = {*(told.get(key) or here), *(() if linears is None else linears.others)}
    draft.quantization = {**told, key: sorted(skipped | {_module(rename(name)) for name in plainly})}


def form_of(held: Held) -> str | None:
    """The one of HELD_IN that a weight is held in, if it is one."""
    settings = held.settings
    found = {
        "bnb4": None if "weight.nested_absmax" in held.headers else settings.get("quant_type"),
        "bnb8": "int8",
        "fp8_block": "fp8_block" if _in_blocks(held) else None,
    }
    return found.get(held.codec.name)


def quantization(form: str, dtype: torch.dtype, others: list[str]) -> Mapping[str, Any]:
    """What config.json says of it, as transformers writes it; `others` are linear modules that are held plainly."""
    if form == "fp8_block":
        told = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": list(BLOCK)}
        return told | {"modules_to_not_convert": others}
    bits8 = form == "int8"
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": not bits8,
        "load_in_8bit": bits8,
        "llm_int8_threshold": OUTLIERS,
        "llm_int8_skip_modules": others,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "bnb_4bit_quant_type": "fp4" if bits8 else form,
        "bnb_4bit_use_double_quant": False,
        "bnb_4bit_compute_dtype": "float32" if bits8 else str(dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
    }


def _in_blocks(held: Held) -> bool:
    """By the form's own blocks, with scales in float32."""
    wanted = tuple(-(-extent // block) for extent, block in zip(held.plain.shape, BLOCK, strict=True))
    codes, scales = (held.headers.get(role) for role in ("weight", "weight_scale_inv"))
    return scales == (torch.float32, wanted) and codes is not None and codes[0] == torch.float8_e4m3fn


def _modules(draft: Draft, plainly: Collection[str]) -> tuple[set[str], list[str]]:
    """The weights to cover, and the other linear modules as they are called in memory."""
    base, linears, rename = draft.base, draft.base.linears(), draft.base.names().rename
    matrices = {info.name: _module(rename(info.name)) for info in base.weights() if _is_matrix(info)}
    chosen = {name for name, module in matrices.items() if linears is not None and module in linears.quantized}
    if linears is None or not chosen:
        chosen = {name for name, change in draft.changes.items() if _is_linear_map(change, base)} - {*plainly}
        return chosen, sorted(module for name, module in matrices.items() if name not in chosen)
    chosen -= {*plainly}
    return chosen, sorted((linears.quantized | linears.others) - {matrices[name] for name in chosen})


def _is_linear_map(change: Change, base: Checkpoint) -> bool:
    site = change.site
    linear = site.op is not None and site.op.name == Linear.name and bool(change.layers)
    return linear and _is_matrix(site.weight) and change.origin == site and site.weight.name not in vocabulary(base)


def _is_matrix(info: TensorInfo) -> bool:
    return len(info.shape) == 2 and info.name.endswith(_WEIGHT) and isinstance(info.dtype, torch.dtype)


def _module(name: str) -> str:
    return name.removesuffix(_WEIGHT)


def _refusals(change: Change, form: str) -> Iterator[FormatError]:
    name = printable(change.site.weight.name)
    if change.new:
        yield FormatError(f"{name}: the base has none of this shape, and {form} is for those it has; merge into 16bit")
    if change.dtype not in _HALVES:
        dtype = str(change.dtype).removeprefix("torch.")
        yield FormatError(f"{name}: it is in {dtype}, which {form} is not made from; give --dtype bfloat16")
