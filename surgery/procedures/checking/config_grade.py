"""The grade of a config.json: whether it has the weights loaded that lie beside it, and read as they are held."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from surgery.codecs.meaning import meaning
from surgery.codecs.methods import LISTED_PLAINLY
from surgery.errors import printable
from surgery.hosts.checkpoint import Checkpoint
from surgery.hosts.packing import quantization_of
from surgery.procedures.places.tying import text_config

_PATTERN = re.compile(r"[^\w.-]")  # in what is no plain name of a module
_WEIGHT = ".weight"
_CHOSEN = "bnb_4bit_compute_dtype"  # by whoever quantizes; no weight hangs on it


def config_differs(base: Checkpoint, wanted: Mapping[str, Any], out: Checkpoint, kept: bool) -> str:
    """Where it would have other weights loaded, or these in another way; nothing if it would not.

    `wanted` is what a merge of ours writes. `kept`: the codes are in the base's own format.
    """
    found = out.config
    if not found or not wanted:
        return ""
    if bool(quantization_of(found)) != bool(quantization_of(wanted)):
        return f"it {'has' if quantization_of(found) else 'lacks'} a quantization_config, unlike the weights"
    return _field(base.config, wanted, found) or _quantization(wanted, found, kept) or _listed(base, wanted, out)


def _field(base: Mapping[str, Any], wanted: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    parts = [text_config(one) for one in (base, wanted, found)]
    for key in ("tie_word_embeddings", "vocab_size"):
        told = parts[1].get(key, wanted.get(key))
        here = parts[2].get(key, found.get(key, parts[0].get(key, base.get(key))))
        if told is not None and here != told:
            return f"{key} is {printable(here)}, {printable(told)} is wanted"
    return ""


def _quantization(wanted: Mapping[str, Any], found: Mapping[str, Any], kept: bool) -> str:
    told, here = meaning(quantization_of(wanted)), meaning(quantization_of(found))
    for key in {**told, **here}:
        if told.get(key) != here.get(key) and (kept or key != _CHOSEN):
            return f"quantization_config.{key} is {printable(here.get(key))}, {printable(told.get(key))} is wanted"
    return ""


def _listed(base: Checkpoint, wanted: Mapping[str, Any], out: Checkpoint) -> str:
    """Whether the modules that it leaves plain are those that are. Lists that differ may mean the same."""
    key = LISTED_PLAINLY.get(str(quantization_of(wanted).get("quant_method")))
    told, here = (quantization_of(one).get(key or "") for one in (wanted, out.config))
    if key is None or _names(told) == _names(here):
        return ""
    called, where = base.called(), f"quantization_config.{key}"
    for name in out.packed:
        if _is_listed(called(name).removesuffix(_WEIGHT), _names(here)):
            return f"{where} names {printable(name)}, which is held in codes"
    linears = base.linears()
    if here is None or linears is None or any(_PATTERN.search(one) for one in _names(here)):
        return ""
    for info in out.weights():
        module = called(info.name).removesuffix(_WEIGHT)
        if info.name not in out.packed and module in linears.quantized and not _is_listed(module, _names(here)):
            return f"{where} does not name {printable(module)}, which is held plainly"
    return ""


def _names(listed: Any) -> Sequence[str]:
    """In one order."""
    return sorted(one for one in listed if isinstance(one, str)) if isinstance(listed, list) else []


def _is_listed(module: str, names: Sequence[str]) -> bool:
    """As loaders match plain names: whole, as the beginning of a path, or as its end."""
    return any(module == one or module.startswith(f"{one}.") or module.endswith(one) for one in names)
