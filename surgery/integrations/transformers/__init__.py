"""transformers: its models by their own methods, its Trainer, and models from an adapter alone."""

from surgery.integrations.transformers.cached import cached_example
from surgery.integrations.transformers.examples import example_for
from surgery.integrations.transformers.export_files import Export, export_checkpoint
from surgery.integrations.transformers.exporting import Pretrained
from surgery.integrations.transformers.loading import Wanted, load_model
from surgery.integrations.transformers.model import is_pretrained, output_heads
from surgery.integrations.transformers.names import name_map
from surgery.integrations.transformers.saving import save_merged
from surgery.integrations.transformers.subclass import attach, detach
from surgery.integrations.transformers.trainer import AdapterTrainer

__all__ = [
    "AdapterTrainer",
    "Export",
    "Pretrained",
    "Wanted",
    "attach",
    "cached_example",
    "detach",
    "example_for",
    "export_checkpoint",
    "is_pretrained",
    "load_model",
    "name_map",
    "output_heads",
    "save_merged",
]
