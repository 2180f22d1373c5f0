"""transformers: its models by their own methods, its Trainer, and models from an adapter alone."""

from surgery.integrations.transformers.cached import cached_example
from surgery.integrations.transformers.default_targets import with_default_targets
from surgery.integrations.transformers.examples import example_for
from surgery.integrations.transformers.export_files import Export, export_checkpoint, live_model
from surgery.integrations.transformers.exporting import Pretrained
from surgery.integrations.transformers.linears import linears_of
from surgery.integrations.transformers.loading import Wanted, load_model
from surgery.integrations.transformers.model import is_pretrained, output_heads, room_of
from surgery.integrations.transformers.names import name_map, names_in_memory, ties_in_memory
from surgery.integrations.transformers.outputs import agreements, run_experts_singly
from surgery.integrations.transformers.quantizing import tell_ejected, tell_quantized
from surgery.integrations.transformers.saving import save_merged
from surgery.integrations.transformers.subclass import attach, detach
from surgery.integrations.transformers.trainer import AdapterTrainer

__all__ = [
    "AdapterTrainer",
    "Export",
    "Pretrained",
    "Wanted",
    "agreements",
    "attach",
    "cached_example",
    "detach",
    "example_for",
    "export_checkpoint",
    "is_pretrained",
    "linears_of",
    "live_model",
    "load_model",
    "name_map",
    "names_in_memory",
    "output_heads",
    "room_of",
    "run_experts_singly",
    "save_merged",
    "tell_ejected",
    "tell_quantized",
    "ties_in_memory",
    "with_default_targets",
]
