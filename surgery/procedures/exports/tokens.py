"""tokens: what a graph with a cache decodes, step by step, beside what its model does."""

from pathlib import Path

import torch
from torch import nn

from surgery.core.agreement import FACTOR
from surgery.errors import CheckError
from surgery.formats.onnx.example import Decoding
from surgery.formats.onnx.runtime import decode


def require_tokens(model: nn.Module, graph: Path, decoding: Decoding) -> None:
    """CheckError unless onnxruntime, step by step with its cache, decodes the tokens that the model does.

    Where two tokens are nearer each other than the rounding of float32, either is right; then the rest is another text.
    """
    with torch.no_grad():
        wanted = decoding.tokens(model, decoding.prompt, decoding.steps)
        found = decode(graph, decoding.prompt, decoding.steps)
        unlike = [i for i, (one, other) in enumerate(zip(wanted.tolist(), found.tolist(), strict=True)) if one != other]
        if not unlike:
            return
        tokens = torch.cat([decoding.prompt, wanted[None, : unlike[0]]], 1)
        logits = model(input_ids=tokens).logits[0, -1].double()
    lead = logits.max() - logits[found[unlike[0]]]
    if lead > FACTOR * torch.finfo(torch.float32).eps * logits.abs().max():
        raise CheckError(
            f"{graph.name}: token {unlike[0]} of {decoding.steps} that onnxruntime decodes is {int(found[unlike[0]])}, "
            f"the model's is {int(wanted[unlike[0]])}; nothing was written; report it"
        )
