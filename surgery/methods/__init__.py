"""What adapters compute; one file a method, listed here by PEFT's name for it."""

from collections.abc import Mapping

from surgery.core.config import AdapterConfig
from surgery.methods.adalora_config import AdaLoraConfig
from surgery.methods.beft import BeftConfig
from surgery.methods.boft_config import BOFTConfig
from surgery.methods.c3a import C3AConfig
from surgery.methods.delora_config import DeloraConfig
from surgery.methods.fourierft import FourierFTConfig
from surgery.methods.glora_config import GloraConfig
from surgery.methods.gralora import GraloraConfig
from surgery.methods.hira import HiraConfig
from surgery.methods.hra import HRAConfig
from surgery.methods.ia3 import IA3Config
from surgery.methods.ln_tuning import LNTuningConfig
from surgery.methods.loha import LoHaConfig
from surgery.methods.lokr_config import LoKrConfig
from surgery.methods.lora_config import LoraConfig
from surgery.methods.miss import MissConfig
from surgery.methods.oft_config import OFTConfig
from surgery.methods.pvera import PveraConfig
from surgery.methods.randlora import RandLoraConfig
from surgery.methods.road import RoadConfig
from surgery.methods.shira import ShiraConfig
from surgery.methods.supertuning import SupertuningConfig
from surgery.methods.tinylora_config import TinyLoraConfig
from surgery.methods.trainable_tokens import TrainableTokensConfig
from surgery.methods.unilora import UniLoraConfig
from surgery.methods.vblora_config import VBLoRAConfig
from surgery.methods.vera import VeraConfig
from surgery.methods.waveft import WaveFTConfig

METHODS: Mapping[str, type[AdapterConfig]] = {
    "LORA": LoraConfig,
    "IA3": IA3Config,
    "ADALORA": AdaLoraConfig,
    "LOHA": LoHaConfig,
    "LOKR": LoKrConfig,
    "VERA": VeraConfig,
    "PVERA": PveraConfig,
    "RANDLORA": RandLoraConfig,
    "VBLORA": VBLoRAConfig,
    "UNILORA": UniLoraConfig,
    "TINYLORA": TinyLoraConfig,
    "OFT": OFTConfig,
    "BOFT": BOFTConfig,
    "ROAD": RoadConfig,
    "HRA": HRAConfig,
    "HIRA": HiraConfig,
    "DELORA": DeloraConfig,
    "GRALORA": GraloraConfig,
    "GLORA": GloraConfig,
    "MISS": MissConfig,
    "SHIRA": ShiraConfig,
    "SUPERTUNING": SupertuningConfig,
    "C3A": C3AConfig,
    "FOURIERFT": FourierFTConfig,
    "WAVEFT": WaveFTConfig,
    "BEFT": BeftConfig,
    "LN_TUNING": LNTuningConfig,
    "TRAINABLE_TOKENS": TrainableTokensConfig,
}
