"""The branch of methods that add a product of two factors, whatever makes these."""

from torch import Tensor
from torch.nn import functional as F

from surgery.core.method import Run
from surgery.core.op import Factors, Op, in_dtype_of, is_many


def factored(x: Tensor, run: Run, op: Op, factors: Factors, dropout: float) -> Tensor:
    """The output of the layer below, and scaling * B A of an input of which `dropout` is left out."""
    if is_many(x) and not dropout:
        plain = run.plain()
        out = None if plain is None else op.apply_with(x, *plain, factors)
        if out is not None:
            return out
    A, B, scaling = factors
    below, x = run(x), in_dtype_of(A, x)
    if dropout:
        x = F.dropout(x, dropout)
    return op.mix_onto(below, op.apply(x, A), B, scaling)
