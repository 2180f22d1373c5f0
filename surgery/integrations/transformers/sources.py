"""Where an adapter comes from, as transformers' `load_adapter` is told it."""

from collections.abc import Mapping
from os import PathLike
from typing import Any

from torch import Tensor

from surgery.adapters.peft import adapter_of, read_adapter
from surgery.core.adapter import Adapter
from surgery.errors import UsageError, printable
from surgery.io.hub import located
from surgery.procedures.places.configs import config_of

# Arguments that leave things as they are, by the values that do.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "local_files_only": (False,),
    "token": (None,),
    "cache_dir": (None,),
    "force_download": (None, False),
    "proxies": (None,),
    "use_safetensors": (None, True),
    "ignore_mismatched_sizes": (None, False),
    "load_config": (None,),
    "device_map": (None,),
}
_HUB = ("local_files_only", "token", "cache_dir", "force_download", "proxies")
_INSTEAD = "set HF_TOKEN, HF_HOME or HF_HUB_OFFLINE in the environment"
_ALONE = "leave it out; an adapter is laid where the model's layers are, in float32 or their dtype"


def given(
    where: str | PathLike[str] | None,
    config: object | None,
    state_dict: Mapping[str, Tensor] | None,
    options: Mapping[str, Any],
) -> Adapter:
    """The adapter at `where`, or the one that `config` and `state_dict` are. UsageError unless it is one of both."""
    for name, value in options.items():
        if name not in ("revision", "subfolder") and value not in _NEUTRAL.get(name, ()):
            step = _INSTEAD if name in _HUB else _ALONE
            raise UsageError(f"load_adapter: {name}={printable(value)}; it cannot be given here; {step}")
    if where is not None:
        place = located(where, options.get("revision"), options.get("subfolder"))
        return read_adapter(place.path)
    if config is None or state_dict is None:
        raise UsageError("load_adapter: neither peft_model_id, nor both peft_config and adapter_state_dict; give one")
    return adapter_of(config_of(config), state_dict, "adapter_state_dict")
