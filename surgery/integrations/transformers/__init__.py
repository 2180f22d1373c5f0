"""transformers: its models by their own methods, its Trainer, and models from an adapter alone."""

from surgery.integrations.transformers.loading import Wanted, load_model
from surgery.integrations.transformers.model import output_heads
from surgery.integrations.transformers.outputs import agreements
from surgery.integrations.transformers.saving import save_merged
from surgery.integrations.transformers.subclass import attach, detach
from surgery.integrations.transformers.trainer import AdapterTrainer

__all__ = ["AdapterTrainer", "Wanted", "agreements", "attach", "detach", "load_model", "output_heads", "save_merged"]
