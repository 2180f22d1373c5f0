"""Every op: two views of one memory, and what torch's or transformers' module computes."""

import pytest
import torch
from rational import same_bits
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from surgery.core.op import WHOLE, Op
from surgery.hosts.model import op_of
from surgery.ops import OPS

OUT, IN, RANK = 6, 5, 3

MODULES = {
    "linear": lambda bias: nn.Linear(IN, OUT, bias=bias),
    "conv1d": lambda _bias: Conv1D(OUT, IN),
    "embedding": lambda _bias: nn.Embedding(IN, OUT),
}
WHOLE_NUMBERS = torch.Generator().manual_seed(0)
each_op = pytest.mark.parametrize("op", OPS.values(), ids=OPS.keys())


def whole(*shape: int) -> Tensor:
    """Small whole numbers: sums and products of them are exact in float32, in any order."""
    return torch.randint(-9, 10, shape, generator=WHOLE_NUMBERS).float()


def given(op: Op, *batch: int) -> Tensor:
    """An input [*batch, in]; an embedding's is one index in place of `in` numbers."""
    if op.name == "embedding":
        return torch.randint(0, IN, batch, generator=WHOLE_NUMBERS)
    return whole(*batch, IN)


def test_each_op_has_its_own_name():
    assert all(op.name == name for name, op in OPS.items())
    assert OPS.keys() == MODULES.keys()


@each_op
def test_a_matrix_and_its_stored_weight_are_one_memory(op: Op):
    matrix = whole(OUT, IN)
    stored = op.stored(matrix)
    again = op.matrix(stored)
    assert stored.data_ptr() == again.data_ptr() == matrix.data_ptr()
    assert again.stride() == matrix.stride()
    assert same_bits(again, matrix)
    stored[1, 2] = 99
    assert bool((matrix == 99).any())


@each_op
def test_stored_is_the_inverse_of_matrix(op: Op):
    stored = whole(*op.stored(torch.empty(OUT, IN)).shape)
    again = op.stored(op.matrix(stored))
    assert same_bits(again, stored)
    assert again.data_ptr() == stored.data_ptr()
    assert again.stride() == stored.stride()


@each_op
def test_the_shape_is_that_of_the_matrix(op: Op):
    stored = op.stored(whole(OUT, IN))
    assert op.shape(tuple(stored.shape)) == tuple(op.matrix(stored).shape) == (OUT, IN)


@each_op
def test_a_tile_is_the_matrix_of_some_stored_rows(op: Op):
    stored = op.stored(whole(OUT, IN)).contiguous()
    matrix, count = op.matrix(stored), stored.shape[0]
    assert torch.equal(matrix[WHOLE], matrix[op.tile(slice(0, count))])
    for start in range(count):
        for stop in range(start + 1, count + 1):
            rows = slice(start, stop)
            assert torch.equal(matrix[op.tile(rows)], op.matrix(stored[rows]))


@each_op
@pytest.mark.parametrize("batch", [(4,), (2, 3), (2, 1, 3)], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_apply_is_what_the_module_computes(op: Op, batch: tuple[int, ...], bias: bool):
    module = MODULES[op.name](bias)
    with torch.no_grad():
        for values in module.parameters():
            values.copy_(whole(*values.shape))
        x = given(op, *batch)
        found = op.apply(x, op.matrix(module.weight), getattr(module, "bias", None))
        assert found.shape == (*batch, OUT)
        assert torch.equal(found, module(x))


@each_op
@pytest.mark.parametrize("batch", [(4,), (2, 3)], ids=str)
def test_a_bias_is_added_to_each_output(op: Op, batch: tuple[int, ...]):
    x, matrix, bias = given(op, *batch), whole(OUT, IN), whole(OUT)
    assert torch.equal(op.apply(x, matrix, bias), op.apply(x, matrix) + bias)


@each_op
@pytest.mark.parametrize("batch", [(4,), (2, 3)], ids=str)
def test_mixing_after_applying_is_applying_the_product(op: Op, batch: tuple[int, ...]):
    x, A, B = given(op, *batch), whole(RANK, IN), whole(OUT, RANK)
    assert torch.equal(op.mix(op.apply(x, A), B), op.apply(x, B @ A))


@each_op
@pytest.mark.parametrize("batch", [(), (4,), (2, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_mixing_onto_is_adding_what_is_mixed(op: Op, batch: tuple[int, ...], dtype: torch.dtype):
    below, h, B = whole(*batch, OUT).to(dtype), whole(*batch, RANK), whole(OUT, RANK)
    assert torch.equal(op.mix_onto(below, h, B, -0.5), below - op.mix(h, B) / 2)
    assert torch.equal(op.mix_onto(below, h.to(dtype), B.to(dtype), 2.0), below + 2 * op.mix(h, B).to(dtype))


@each_op
def test_the_module_is_recognised(op: Op):
    assert op_of(MODULES[op.name](True)) is op


@each_op
def test_only_numbers_take_dropout(op: Op):
    assert op.accepts_dropout() == given(op, 4).is_floating_point()
