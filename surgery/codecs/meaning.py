"""meaning: what a quantization_config says of how codes are read and run, whoever wrote it.

What is not told is what loaders then take; names of groups, versions and how scales were once found mean nothing.
"""

import json
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from surgery.codecs import compressed_config, torchao
from surgery.codecs.bitsandbytes_config import OUTLIERS
from surgery.codecs.fp8_block import BLOCK

Told = Mapping[str, Any]

# What a field is where it is absent, or null.
_FOUR_BITS: Told = MappingProxyType(
    {
        "bnb_4bit_quant_type": "fp4",
        "bnb_4bit_use_double_quant": False,
        "bnb_4bit_compute_dtype": "float32",
        "bnb_4bit_quant_storage": "uint8",
    }
)
_EIGHT_BITS: Told = MappingProxyType({"llm_int8_threshold": OUTLIERS, "llm_int8_has_fp16_weight": False})
_FP8: Told = MappingProxyType({"activation_scheme": "dynamic", "weight_block_size": list(BLOCK)})
_ARGUMENTS: Told = MappingProxyType(
    {"num_bits": 8, "type": "int", "symmetric": True, "group_size": None, "block_structure": None, "dynamic": False}
)


def meaning(told: Told) -> Told:
    """By field; empty of no quantization at all."""
    if not told:
        return {}
    method = str(told.get("quant_method"))
    return {"quant_method": method, **_METHODS.get(method, _alone)(told)}


def _alone(_: Told) -> Told:
    """The method tells all, or its fields are not known."""
    return {}


def _bitsandbytes(told: Told) -> Told:
    bits = {one: bool(told.get(one) or told.get(f"_{one}")) for one in ("load_in_4bit", "load_in_8bit")}
    fields = _with_defaults(told, _FOUR_BITS if bits["load_in_4bit"] else _EIGHT_BITS)
    return bits | {name: one.removeprefix("torch.") if isinstance(one, str) else one for name, one in fields.items()}


def _fp8(told: Told) -> Told:
    return {name: told.get(name, usual) for name, usual in _FP8.items()}  # null blocks are one for the whole weight


def _compressed(told: Told) -> Told:
    groups = told.get("config_groups")
    found = [
        _group(one, told) for one in (groups.values() if isinstance(groups, dict) else ()) if isinstance(one, dict)
    ]
    return {"config_groups": sorted(found, key=_spelled), "kv_cache_scheme": told.get("kv_cache_scheme")}


def _group(group: Told, told: Told) -> Told:
    """Of a group of layers: which they are, and how they are held."""
    kinds = ("weights", "input_activations", "output_activations")
    arguments = {kind: _arguments(group[kind]) if isinstance(group.get(kind), dict) else None for kind in kinds}
    targets = group.get("targets")
    named = sorted(targets, key=_spelled) if isinstance(targets, list) else targets
    return {"targets": named, "format": group.get("format") or told.get("format"), **arguments}


def _arguments(told: Told) -> Told:
    """Of a tensor. The strategy follows from the size of groups where it is not told."""
    found = _with_defaults(told, _ARGUMENTS)
    size = found["group_size"]
    usual = "tensor" if size is None else "channel" if size == -1 else "group"
    strategy = told.get("strategy") or usual
    return {**found, "strategy": strategy, "group_size": None if strategy == "channel" else size}


def _torchao(told: Told) -> Told:
    return {"quant_type": _unversioned(told.get("quant_type"))}


def _unversioned(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _unversioned(one) for key, one in value.items() if key != "_version"}
    return value


def _with_defaults(told: Told, defaults: Told) -> dict[str, Any]:
    return {name: usual if told.get(name) is None else told[name] for name, usual in defaults.items()}


def _spelled(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


_METHODS: Mapping[str, Callable[[Told], Told]] = {
    "bitsandbytes": _bitsandbytes,
    "fp8": _fp8,
    compressed_config.METHOD: _compressed,
    torchao.METHOD: _torchao,
}
