"""Unpacking: the quantized weights of a base become plain ones, or it is refused by name."""

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import replace

import torch

from surgery.codecs.bnb4 import Bnb4
from surgery.codecs.bnb8 import Bnb8
from surgery.codecs.methods import refuse_unread
from surgery.core.site import CODES, RawDtype, Site, TensorInfo
from surgery.errors import ConfigError, FormatError, InputError, UsageError, printable
from surgery.hosts.change import Change
from surgery.hosts.checkpoint import Checkpoint
from surgery.hosts.encoded import made_as
from surgery.hosts.packing import BESIDE, Held, model_dtype, quantization_of
from surgery.ops.experts import ExpertsByOutput
from surgery.ops.linear import Conv1D, Linear
from surgery.procedures.places.op_choice import CONV1D_FAMILIES, CONV1D_NAMES, families
from surgery.procedures.places.tying import vocabulary
from surgery.procedures.planning.draft import Draft

_CODES = frozenset({torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2})


def unpack(draft: Draft, compute_dtype: torch.dtype | None, asked: bool) -> None:
    """A change for each weight of the base that is not held plainly; it is decoded to `compute_dtype`.

    By default that is what its quantization computes in. UsageError where nothing is quantized, and it was `asked`
    for, or a dtype was given.
    """
    base, told = draft.base, quantization_of(draft.base.config)
    if not _known(draft):
        return
    if asked or compute_dtype is not None:
        _require_packed(base, "into" if asked else "compute_dtype")
    written: Counter[tuple[str, ...]] = Counter()
    for name, held in base.packed.items():
        dtype = compute_dtype or held.plain.torch_dtype
        change = draft.changes.get(name) or Change(Site(name, {"weight": held.plain}), dtype)
        draft.changes[name] = _plain(change, held, dtype, base)
        written[held.codec.name, *(_word(one) for one in (dtype, draft.changes[name].dtype))] += 1
    for (codec, computed, outcome), count in written.items():
        draft.notes.append(f"{count} weights held as {codec} are decoded to {computed} and written in {outcome}")
    draft.plain = bool(told)


def keep(draft: Draft, dtype: torch.dtype | None, plainly: Collection[str] = ()) -> None:
    """The changes of quantized weights are held as these are, by their own scales.

    Those of `plainly`, and those that the adapter replaces, are in 16 bits. UsageError for a `dtype`.
    """
    if not _known(draft):
        return
    _require_packed(draft.base, "into")
    if dtype is not None:
        raise UsageError("`into=keep`: weights keep the dtypes that they have; leave `dtype` and `compute_dtype` out")
    for name in [name for name in draft.changes if name in draft.base.packed]:
        change, held = draft.changes[name], draft.base.packed[name]
        if name in plainly or change.saved is not None:
            draft.changes[name] = _plain(change, held, held.plain.torch_dtype, draft.base)
            continue
        op = change.site.acting
        if op.stack and not (op.swapped and held.codec.stacked):
            draft.refusals.append(
                FormatError(
                    f"{printable(name)}: a stack held as {held.codec.name}, which cannot keep its format; "
                    "give `into=16bit`"
                )
            )
            continue
        if op.stack:
            change = replace(change, site=change.site.with_op(ExpertsByOutput(stack=op.stack, roles=op.roles)))
        together = held.codec.step(held.headers, held.settings)
        weight = change.site.weight._replace(dtype=torch.float32)  # what its codes and scales are multiplied in
        tensors = {**change.site.tensors, "weight": weight, CODES: held.first}
        site = replace(change.site, tensors=tensors, together=together)
        draft.changes[name] = replace(change, site=site, dtype=torch.float32, held=held.codec.name, keep=True)


def pass_through(draft: Draft, form: str, dtype: torch.dtype | None) -> None:
    """Layers of linear maps are laid over the weights as they read from `form`, encoded from and decoded to `dtype`.

    By default that is the weight's own. UsageError for a base that is quantized already. What is no linear map, and
    an output head, is not held so in training.
    """
    base = draft.base
    if base.packed or quantization_of(base.config):
        raise UsageError(f"{printable(base.path)}: it is quantized itself; leave `base_as` out")
    heads, passed = vocabulary(base), 0
    for name, change in draft.changes.items():
        op = None if change.site.op is None else change.site.op.name
        if op == Conv1D.name and change.layers:
            draft.refusals.append(
                FormatError(f"{printable(name)}: a Conv1D, which `base_as` is not for; merge it into its own base")
            )
        elif op == Linear.name and change.layers and name not in heads and change.origin == change.site:
            weight = change.site.weight._replace(dtype=dtype or change.site.weight.torch_dtype)
            try:
                made_as(form, weight.shape, weight.torch_dtype)
            except ConfigError as error:
                draft.refusals.append(FormatError(f"{printable(name)}: `base_as={form}` does not hold it: {error}"))
                continue
            site = replace(change.site, tensors={**change.site.tensors, "weight": weight})
            draft.changes[name], passed = replace(change, site=site, through=form), passed + 1
    others = sum(len(info.shape) == 2 for info in base.weights()) - passed
    draft.notes.append(
        f"{passed} weights are merged as they read from {form}; {others} other matrices stay as they are, though some "
        "may have been held so in training too"
    )


def _known(draft: Draft) -> bool:
    """Whether the base is held in formats that are read; if not, it is refused."""
    told, base = quantization_of(draft.base.config), draft.base
    try:
        if told:
            refuse_unread(told)
    except FormatError as error:
        draft.refusals.insert(0, FormatError(f"{printable(base.path)}: {error}"))
        return False
    draft.refusals[:0] = _refusals(base)  # what ails the base explains what does not fit it
    return True


def _require_packed(base: Checkpoint, option: str) -> None:
    if not base.packed:
        raise UsageError(f"{printable(base.path)}: no weight of it is quantized; leave `{option}` out")


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
            if isinstance(info.dtype, RawDtype) or info.dtype in _CODES or info.name.endswith(BESIDE):
                yield _unclaimed(info)


def _unclaimed(info: TensorInfo) -> FormatError:
    return FormatError(
        f"{printable(info.name)}: {_word(info.dtype)} {list(info.shape)}, and no scales or codes beside it that "
        "tell what it means; a base whose quantized weights are all known is wanted; dequantize it first"
    )


def _word(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")
