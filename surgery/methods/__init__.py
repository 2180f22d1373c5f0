"""What adapters compute; one file a method, listed here by PEFT's name for it."""

from collections.abc import Mapping

from surgery.core.config import AdapterConfig
from surgery.methods.lora import LoraConfig

METHODS: Mapping[str, type[AdapterConfig]] = {"LORA": LoraConfig}
