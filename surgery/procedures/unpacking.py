"""Unpacking: the quantized weights of a base become plain ones, or it is refused by name."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import torch

from surgery.codecs.bnb4 import Bnb4
from surgery.codecs.bnb8 import Bnb8
from surgery.core.site import RawDtype, Site, TensorInfo
from surgery.errors import FormatError, InputError, UsageError, printable
from surgery.hosts.checkpoint import Checkpoint
from surgery.hosts.packing import Held, model_dtype, quantization_of
from surgery.hosts.views import Change
from surgery.procedures.draft import Draft
from surgery.procedures.op_choice import CONV1D_FAMILIES, CONV1D_NAMES, families

# What config.json calls the formats that are read, and what to do about others.
METHODS = frozenset({"bitsandbytes", "fp8", "fbgemm_fp8", "mxfp4"})
_OTHERS = {
    "gptq": "merge into the base that it was quantized from, and quantize that anew with GPTQModel",
    "awq": "merge into the base that it was quantized from, and quantize that anew with llm-compressor",
    "hqq": "merge into the base that it was quantized from, and quantize that anew with hqq",
    "compressed-tensors": "load it with transformers and run_compressed=False, and save it plainly",
    "torchao": "load it with transformers, dequantize() it, and save it plainly",
}
_CODES = frozenset({torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2})


def unpack(draft: Draft, compute_dtype: torch.dtype | None) -> None:
    """A change for each weight of the base that is not held plainly; it is decoded to `compute_dtype`.

    By default that is what its quantization computes in. UsageError for a dtype where nothing is quantized.
    """
    base = draft.base
    told = quantization_of(base.config)
    if told and told.get("quant_method") not in METHODS:
        draft.refusals.insert(0, _unknown(base, told.get("quant_method")))
        return
    if compute_dtype is not None and not base.packed:
        raise UsageError(f"{printable(base.path)}: no weight of it is quantized; leave compute_dtype out")
    draft.refusals += _refusals(base)
    written: Counter[tuple[str, ...]] = Counter()
    for name, held in base.packed.items():
        dtype = compute_dtype or held.plain.torch_dtype
        change = draft.changes.get(name) or Change(Site(name, {"weight": held.plain}), dtype)
        draft.changes[name] = _plain(change, held, dtype, base)
        written[held.codec.name, *(_word(one) for one in (dtype, draft.changes[name].dtype))] += 1
    for (codec, computed, outcome), count in written.items():
        draft.notes.append(f"{count} weights held as {codec} are decoded to {computed} and written in {outcome}")
    if told:
        draft.notes.append("config.json loses its quantization_config")
    draft.plain = bool(told)


def _plain(change: Change, held: Held, dtype: torch.dtype, base: Checkpoint) -> Change:
    """The change of a weight that is decoded to `dtype`, and written in 16 bits unless the model has more."""
    weight = change.site.weight._replace(dtype=dtype)
    site = replace(change.site, tensors={**change.site.tensors, "weight": weight})
    options = (dtype, held.codec.dtype(held.settings), model_dtype(base.config))
    outcome = next((one for one in options if one is not None and one.itemsize == 2), dtype)
    return replace(change, site=site, dtype=outcome, held=held.codec.name)


def _refusals(base: Checkpoint) -> Iterator[InputError]:
    turned = CONV1D_NAMES if CONV1D_FAMILIES & set(families(base.config)) else frozenset()
    for name, held in base.packed.items():
        module = name.removesuffix(held.codec.plain_ending).rpartition(".")[2]
        if held.codec.name in {Bnb4.name, Bnb8.name} and module in turned:
            yield FormatError(
                f"{printable(name)}: bitsandbytes holds this Conv1D transposed, which is not supported; "
                "a plain base is wanted; load it with transformers, dequantize() it, and save it"
            )
    if base.packed or quantization_of(base.config):
        for info in base.weights():
            if isinstance(info.dtype, RawDtype) or info.dtype in _CODES:
                yield _unclaimed(info)


def _unclaimed(info: TensorInfo) -> FormatError:
    return FormatError(
        f"{printable(info.name)}: {_word(info.dtype)} {list(info.shape)}, and no scales beside it that tell what it "
        "means; a base whose quantized weights are all known is wanted; dequantize it first"
    )


def _unknown(base: Checkpoint, method: object) -> FormatError:
    step = _OTHERS.get(str(method), "dequantize it first")
    known = ", ".join(sorted(METHODS))
    return FormatError(
        f"{printable(base.path)}: quantized with {printable(method)}, which is not supported; {known} or a plain base "
        f"is wanted; {step}"
    )


def _word(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")
