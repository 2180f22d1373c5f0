"""peft's CorDA, which imports attrs for a dataclass alone and does not ask for it: the standard library's stands in."""

from dataclasses import dataclass
from types import SimpleNamespace
from unittest import mock

from peft.tuners.lora.config import CordaConfig

with mock.patch.dict("sys.modules", {"attr": SimpleNamespace(dataclass=dataclass)}):
    from peft.tuners.lora.corda import preprocess_corda

__all__ = ["CordaConfig", "preprocess_corda"]
