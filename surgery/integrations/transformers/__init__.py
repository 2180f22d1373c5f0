"""transformers: its models by their own methods, its Trainer, and models from an adapter alone."""

from surgery.integrations.transformers.loading import Wanted, load_model
from surgery.integrations.transformers.model import output_heads
from surgery.integrations.transformers.names import name_map
from surgery.integrations.transformers.saving import save_merged
from surgery.integrations.transformers.subclass import attach, detach
from surgery.integrations.transformers.trainer import AdapterTrainer

__all__ = ["AdapterTrainer", "Wanted", "attach", "detach", "load_model", "name_map", "output_heads", "save_merged"]
