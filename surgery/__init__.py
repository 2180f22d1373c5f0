"""Model surgery: adapters into torch models and out again, bit for bit."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from surgery.public_names import HOMES, OF_PEFT

if TYPE_CHECKING:
    from surgery import testing
    from surgery.api.adalora import adalora_step, orthogonal_loss
    from surgery.api.checking import diff, inspect, verify_checkpoint
    from surgery.api.export import export_onnx
    from surgery.api.files import (
        merge_checkpoint,
        plan,
        push_to_hub,
        unmerge_checkpoint,
    )
    from surgery.api.live import (
        eject,
        inject,
        load,
        merge,
        quantize,
        record_inputs,
        save,
        unmerge,
    )
    from surgery.api.made_adapters import combine, extract
    from surgery.api.pretrained import load_model, save_merged
    from surgery.api.running import disable_adapters, enable_adapters, mixed_batch, set_adapter
    from surgery.core.config import AdapterConfig
    from surgery.core.task import TaskType
    from surgery.errors import (
        AbsentError,
        CheckError,
        ConfigError,
        ConfigTypeError,
        EnvironmentFault,
        FormatError,
        InputError,
        MatchError,
        OutputExistsError,
        ShapeError,
        StateError,
        SurgeryError,
        UsageError,
        ValueRangeError,
    )
    from surgery.integrations.transformers import AdapterTrainer
    from surgery.integrations.transformers.callback import AdaLoraCallback
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
    from surgery.procedures.checking.diff import DiffReport
    from surgery.procedures.checking.inspect import Inspection
    from surgery.procedures.checking.verify_report import VerifyReport
    from surgery.procedures.exports.export import ExportReport
    from surgery.procedures.making.combine import CombineReport
    from surgery.procedures.making.extract import ExtractReport
    from surgery.procedures.planning.plan import Plan
    from surgery.procedures.writing.merge_checkpoint import MergeReport
    from surgery.procedures.writing.publish import PushReport
    from surgery.procedures.writing.unmerge_checkpoint import UnmergeReport

__all__ = [
    "AbsentError",
    "AdaLoraCallback",
    "AdaLoraConfig",
    "AdapterConfig",
    "AdapterTrainer",
    "BOFTConfig",
    "BeftConfig",
    "C3AConfig",
    "CheckError",
    "CombineReport",
    "ConfigError",
    "ConfigTypeError",
    "DeloraConfig",
    "DiffReport",
    "EnvironmentFault",
    "ExportReport",
    "ExtractReport",
    "FormatError",
    "FourierFTConfig",
    "GloraConfig",
    "GraloraConfig",
    "HRAConfig",
    "HiraConfig",
    "IA3Config",
    "InputError",
    "Inspection",
    "LNTuningConfig",
    "LoHaConfig",
    "LoKrConfig",
    "LoraConfig",
    "MatchError",
    "MergeReport",
    "MissConfig",
    "OFTConfig",
    "OutputExistsError",
    "Plan",
    "PushReport",
    "PveraConfig",
    "RandLoraConfig",
    "RoadConfig",
    "ShapeError",
    "ShiraConfig",
    "StateError",
    "SupertuningConfig",
    "SurgeryError",
    "TaskType",
    "TinyLoraConfig",
    "TrainableTokensConfig",
    "UniLoraConfig",
    "UnmergeReport",
    "UsageError",
    "VBLoRAConfig",
    "ValueRangeError",
    "VeraConfig",
    "VerifyReport",
    "WaveFTConfig",
    "adalora_step",
    "combine",
    "diff",
    "disable_adapters",
    "eject",
    "enable_adapters",
    "export_onnx",
    "extract",
    "inject",
    "inspect",
    "load",
    "load_model",
    "merge",
    "merge_checkpoint",
    "mixed_batch",
    "orthogonal_loss",
    "plan",
    "push_to_hub",
    "quantize",
    "record_inputs",
    "save",
    "save_merged",
    "set_adapter",
    "testing",
    "unmerge",
    "unmerge_checkpoint",
    "verify_checkpoint",
]


def __getattr__(name: str) -> Any:
    """Public names come from their files when they are first used: torch is not imported before."""
    if name not in __all__:
        here = f"; what peft has so is here {OF_PEFT[name]}" if name in OF_PEFT else ""
        raise AttributeError(f"module 'surgery' has no attribute {name!r}{here}", name=name)
    if name == "testing":
        return import_module("surgery.testing")
    if name.endswith("Config"):
        import_module("surgery.adapters.configs")  # a floor above the configs; lets them read and write files
    value = getattr(import_module(f"surgery.{HOMES.get(name, 'api.live')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
