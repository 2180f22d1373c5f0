"""What adapters compute; one file a method, listed here by PEFT's name for it."""

from collections.abc import Mapping

from surgery.core.config import AdapterConfig
from surgery.methods.adalora_config import AdaLoraConfig
from surgery.methods.beft import BeftConfig
from surgery.methods.ia3 import IA3Config
from surgery.methods.ln_tuning import LNTuningConfig
from surgery.methods.lora_config import LoraConfig
from surgery.methods.trainable_tokens import TrainableTokensConfig

METHODS: Mapping[str, type[AdapterConfig]] = {
    "LORA": LoraConfig,
    "IA3": IA3Config,
    "ADALORA": AdaLoraConfig,
    "TRAINABLE_TOKENS": TrainableTokensConfig,
    "LN_TUNING": LNTuningConfig,
    "BEFT": BeftConfig,
}
