"""What adapters compute; one file a method, listed here by PEFT's name for it."""

from collections.abc import Mapping

from surgery.core.config import AdapterConfig
from surgery.methods.adalora_config import AdaLoraConfig
from surgery.methods.delora_config import DeloraConfig
from surgery.methods.gralora import GraloraConfig
from surgery.methods.hira import HiraConfig
from surgery.methods.ia3 import IA3Config
from surgery.methods.lora_config import LoraConfig

METHODS: Mapping[str, type[AdapterConfig]] = {
    "LORA": LoraConfig,
    "IA3": IA3Config,
    "ADALORA": AdaLoraConfig,
    "HIRA": HiraConfig,
    "DELORA": DeloraConfig,
    "GRALORA": GraloraConfig,
}
