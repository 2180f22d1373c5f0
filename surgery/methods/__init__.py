"""What adapters compute; one file a method, listed here by PEFT's name for it."""

from collections.abc import Mapping

from surgery.core.config import AdapterConfig
from surgery.methods.adalora_config import AdaLoraConfig
from surgery.methods.hra import HRAConfig
from surgery.methods.ia3 import IA3Config
from surgery.methods.lora_config import LoraConfig
from surgery.methods.oft_config import OFTConfig

METHODS: Mapping[str, type[AdapterConfig]] = {
    "LORA": LoraConfig,
    "IA3": IA3Config,
    "ADALORA": AdaLoraConfig,
    "OFT": OFTConfig,
    "HRA": HRAConfig,
}
