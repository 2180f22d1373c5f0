"""What transformers' models know of themselves."""

import sys

from torch import nn


def is_pretrained(root: nn.Module) -> bool:
    """Is it a model of transformers? If so, transformers is imported already."""
    transformers = sys.modules.get("transformers")
    return transformers is not None and isinstance(root, transformers.PreTrainedModel)


def output_heads(root: nn.Module) -> set[str]:
    """Paths of the output embeddings, which "all-linear" leaves out; none for other models."""
    head = root.get_output_embeddings() if is_pretrained(root) else None  # type: ignore[operator]
    return set() if head is None else {name for name, module in root.named_modules() if module is head}


def room_of(root: nn.Module) -> int | None:
    """The highest rank that adapters are to be swapped with, as transformers' `enable_peft_hotswap` was told it."""
    told: dict[str, int] | None = getattr(root, "_prepare_peft_hotswap_kwargs", None)
    return None if told is None else told["target_rank"]
