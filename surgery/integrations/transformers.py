"""transformers: what its models know of themselves."""

import sys

from torch import nn


def output_heads(root: nn.Module) -> set[str]:
    """Paths of the output embeddings, which "all-linear" leaves out; none for other models."""
    transformers = sys.modules.get("transformers")
    if transformers is None or not isinstance(root, transformers.PreTrainedModel):
        return set()
    head = root.get_output_embeddings()
    return set() if head is None else {name for name, module in root.named_modules() if module is head}
