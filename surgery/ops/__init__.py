"""How a weight acts on an input; one file an op."""

from collections.abc import Mapping

from surgery.core.op import Op
from surgery.ops.attention import Attention
from surgery.ops.bias import Bias
from surgery.ops.convolution import Convolution
from surgery.ops.embedding import Embedding
from surgery.ops.experts import Experts, ExpertsTransposed
from surgery.ops.linear import Conv1D, Linear

OPS: Mapping[str, Op] = {op.name: op for op in (Linear(), Conv1D(), Embedding(), Convolution(), Attention())}

# And those that no module is: what stands beside a weight of any op, and parameters by themselves.
ROLES: Mapping[str, Op] = {**OPS, **{op.name: op for op in (Bias(), Experts(), ExpertsTransposed())}}
