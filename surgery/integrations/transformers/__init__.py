"""transformers: its models by their own methods, its Trainer, and models from an adapter alone."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from surgery.integrations.transformers.cached import cached_example
    from surgery.integrations.transformers.default_targets import with_default_targets
    from surgery.integrations.transformers.examples import example_for
    from surgery.integrations.transformers.export_files import Export, export_checkpoint, live_model
    from surgery.integrations.transformers.exporting import Pretrained
    from surgery.integrations.transformers.linears import linears_of
    from surgery.integrations.transformers.loading import Wanted, load_model
    from surgery.integrations.transformers.model import is_pretrained, output_heads, room_of
    from surgery.integrations.transformers.names import name_map, names_in_memory, ties_in_memory
    from surgery.integrations.transformers.outputs import agreements, refuse_uncompared, run_experts_singly
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
    "refuse_uncompared",
    "room_of",
    "run_experts_singly",
    "save_merged",
    "tell_ejected",
    "tell_quantized",
    "ties_in_memory",
    "with_default_targets",
]

_HOMES = {
    "AdapterTrainer": "trainer",
    "Export": "export_files",
    "Pretrained": "exporting",
    "Wanted": "loading",
    "agreements": "outputs",
    "attach": "subclass",
    "cached_example": "cached",
    "detach": "subclass",
    "example_for": "examples",
    "export_checkpoint": "export_files",
    "is_pretrained": "model",
    "linears_of": "linears",
    "live_model": "export_files",
    "load_model": "loading",
    "name_map": "names",
    "names_in_memory": "names",
    "output_heads": "model",
    "refuse_uncompared": "outputs",
    "room_of": "model",
    "run_experts_singly": "outputs",
    "save_merged": "saving",
    "tell_ejected": "quantizing",
    "tell_quantized": "quantizing",
    "ties_in_memory": "names",
    "with_default_targets": "default_targets",
}


def __getattr__(name: str) -> Any:
    """Each name comes from its file when it is first used: a merge of files loads nothing that runs models."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name)
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
