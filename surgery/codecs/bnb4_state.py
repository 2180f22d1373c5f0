"""The quant state of bitsandbytes: what 4-bit codes mean, in JSON, in bytes beside them."""

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from surgery.codecs.bnb4_fresh import BLOCKSIZES, DTYPES, KINDS
from surgery.core.codec import Headers, Settings
from surgery.errors import FormatError, printable

STATES = {f"weight.quant_state.bitsandbytes__{kind}": kind for kind in KINDS}
PARTS = ("weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map")
_STATE_BYTES = 4096
_LONGEST = 24  # characters of a float


def read_state(headers: Headers, load: Callable[[str], Tensor]) -> Settings:
    """That of whole tensors, which `load` gives by role. FormatError where they contradict it or each other."""
    for part in (part for part in PARTS[:2] if part not in headers):
        raise FormatError(f"{part} is missing, without which its 4-bit codes mean nothing; save the model again")
    states = sorted(STATES.keys() & headers.keys())
    if len(states) != 1:
        raise FormatError(
            f"{' and '.join(states) or 'no quant state'} beside its 4-bit codes; one of "
            f"{' and '.join(STATES)} is wanted; save the model again"
        )
    role = states[0]
    if headers[role][0] != torch.uint8 or math.prod(headers[role][1]) > _STATE_BYTES:
        raise FormatError("its quant state is no JSON in bytes; was it saved by bitsandbytes?")
    _check_dtypes(headers)
    state = _state(bytes(load(role).flatten().tolist()), STATES[role], "weight.nested_absmax" in headers)
    for part, wanted in _sizes(headers, state).items():
        found = math.prod(headers[part][1]) if part in headers else 0
        if found != wanted:
            raise FormatError(
                f"{part} has {found} elements; {wanted} are wanted for {state['shape']} in blocks of "
                f"{state['blocksize']}, as its quant state says; was it changed by another tool?"
            )
    return state


def spelled(state: Settings) -> str:
    """As JSON, of a length that no values decide, so that a file can be laid out before they are known."""
    if "nested_offset" not in state:
        return json.dumps(state)
    return json.dumps(state).ljust(len(json.dumps({**state, "nested_offset": 0.0})) + _LONGEST - len("0.0"))


def _check_dtypes(headers: Headers) -> None:
    """FormatError unless each tensor has a dtype that can be looked up in, or multiplied by."""
    scale = (torch.uint8,) if PARTS[2] in headers else (torch.float32, torch.bfloat16, torch.float16)
    wanted = dict.fromkeys(PARTS[1:], (torch.float32,)) | {PARTS[0]: scale}
    for role, dtypes in wanted.items():
        if role in headers and headers[role][0] not in dtypes:
            held = str(headers[role][0]).removeprefix("torch.")
            raise FormatError(f"{role} is in {held}, which bitsandbytes does not write; was it cast by another tool?")


def _state(raw: bytes, kind: str, nested: bool) -> dict[str, Any]:
    """The quant state. FormatError where it is none that bitsandbytes writes."""
    try:
        found = json.loads(raw)
    except (ValueError, RecursionError):
        found = None
    state = found if isinstance(found, dict) else {}
    wanted: Mapping[str, Callable[[Any], bool]] = {
        "quant_type": lambda one: one == kind,
        "blocksize": lambda one: type(one) is int and one in BLOCKSIZES,
        "dtype": lambda one: isinstance(one, str) and one in DTYPES,
        "shape": _is_shape,
    }
    if nested:
        wanted = {
            **wanted,
            "nested_blocksize": wanted["blocksize"],
            "nested_offset": lambda one: type(one) in {int, float} and math.isfinite(one),
        }
    for key, holds in wanted.items():
        if not holds(state.get(key)):
            raise FormatError(
                f"{key} of its quant state is {printable(state.get(key))}; what bitsandbytes writes is wanted; "
                "was the file damaged?"
            )
    return state


def _is_shape(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(type(one) is int and 0 < one < 1 << 40 for one in value)


def _sizes(headers: Headers, state: Settings) -> dict[str, int]:
    """How many elements each tensor has to have."""
    count = math.prod(state["shape"])
    blocks = -(-count // state["blocksize"])
    found = {"weight": -(-count // (2 * headers["weight"][0].itemsize)), PARTS[0]: blocks, PARTS[1]: 16}
    if PARTS[2] in headers:
        found |= {PARTS[2]: -(-blocks // state["nested_blocksize"]), PARTS[3]: 256}
    return found
