"""Every op: two views of one memory, and what torch's or transformers' module computes."""

import math

import pytest
import torch
from op_examples import EXAMPLES, IN, MODULES, OUT, beside, shape_given, stored_weight
from rational import same_bits
from torch import Tensor, nn

from surgery.core.op import WHOLE, Op
from surgery.hosts.recognition import op_of
from surgery.ops import OPS

RANK = 4
WHOLE_NUMBERS = torch.Generator().manual_seed(0)
each_op = pytest.mark.parametrize("op", EXAMPLES.values(), ids=EXAMPLES.keys())
each_module = pytest.mark.parametrize("name", EXAMPLES)


def whole(*shape: int) -> Tensor:
    """Small whole numbers: sums and products of them are exact in float32, in any order."""
    return torch.randint(-9, 10, shape, generator=WHOLE_NUMBERS).float()


def given(op: Op, *batch: int) -> Tensor:
    """An input [*batch, in]; an embedding's is one index in place of `in` numbers."""
    shape = shape_given(op, *batch)
    return torch.randint(0, IN, shape, generator=WHOLE_NUMBERS) if op.name == "embedding" else whole(*shape)


def test_each_op_has_its_own_name():
    assert all(op.name == name for name, op in OPS.items())
    assert OPS.keys() == {op.name for op in EXAMPLES.values()}


@each_op
def test_a_matrix_and_its_stored_weight_are_one_memory(op: Op):
    matrix = whole(OUT, IN)
    stored = op.stored(matrix)
    again = op.matrix(stored)
    assert stored.data_ptr() == again.data_ptr() == matrix.data_ptr()
    assert again.stride() == matrix.stride()
    assert same_bits(again, matrix)
    stored[1].fill_(99)
    assert bool((matrix == 99).any())
    assert not bool((matrix == 99).all())


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


@each_module
def test_an_op_for_a_stored_shape_is_laid_out_as_that_of_a_module_with_such_a_weight(name: str):
    stored = whole(*stored_weight(MODULES[name](False)).shape)
    on_files, live = OPS[EXAMPLES[name].name].over(tuple(stored.shape)), EXAMPLES[name]
    assert same_bits(on_files.matrix(stored), live.matrix(stored))
    assert same_bits(on_files.stored(live.matrix(stored)), stored)


@each_op
def test_a_row_or_a_column_broadcasts_over_the_stored_weight_as_over_the_matrix(op: Op):
    stored = op.stored(whole(OUT, IN))
    for part in (whole(OUT, 1), whole(1, IN)):
        assert torch.equal(op.matrix(stored * op.stored(part)), op.matrix(stored) * part)


@each_op
def test_a_number_for_each_channel_laid_over_the_matrix_scales_the_input(op: Op):
    if op.name == "embedding":
        return
    x, matrix, factors = given(op, 3), whole(OUT, IN), whole(op.channels(IN))
    scaled = matrix * op.for_inputs(factors, (OUT, IN))
    axis = 1 if op.kernel else -1
    assert torch.equal(op.apply(x, scaled), op.apply((x.movedim(axis, -1) * factors).movedim(-1, axis), matrix))


@each_op
def test_a_tile_is_the_matrix_of_some_stored_rows(op: Op):
    stored = op.stored(whole(OUT, IN)).contiguous()
    matrix, count = op.matrix(stored), stored.shape[0]
    assert torch.equal(matrix[WHOLE], matrix[op.tile(slice(0, count))])
    for start in range(count):
        for stop in range(start + 1, count + 1):
            rows = slice(start, stop)
            assert torch.equal(matrix[op.tile(rows)], op.matrix(stored[rows]))


@each_module
@pytest.mark.parametrize("batch", [(4,), (2, 3), (2, 1, 3)], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_apply_is_what_the_module_computes(name: str, batch: tuple[int, ...], bias: bool):
    if name == "attention":  # the map is one step of what it computes: see tests/peers
        return
    op, module = EXAMPLES[name], MODULES[name](bias)
    with torch.no_grad():
        for values in module.parameters():
            values.copy_(whole(*values.shape))
        x = given(op, *batch)
        found = op.apply(x, op.matrix(module.weight), getattr(module, "bias", None))
        assert torch.equal(found, module(x))
        assert op.kernel or found.shape == (*batch, OUT)
        if op.kernel:  # it takes one input without a batch too
            assert torch.equal(op.apply(x[0], op.matrix(module.weight), getattr(module, "bias", None)), found[0])


@each_op
@pytest.mark.parametrize("batch", [(4,), (2, 3)], ids=str)
def test_a_bias_is_added_to_each_output(op: Op, batch: tuple[int, ...]):
    x, matrix, bias = given(op, *batch), whole(OUT, IN), whole(OUT)
    assert torch.equal(op.apply(x, matrix, bias), op.apply(x, matrix) + beside(op, bias))


@each_op
@pytest.mark.parametrize("batch", [(4,), (2, 3)], ids=str)
def test_mixing_after_applying_is_applying_the_product(op: Op, batch: tuple[int, ...]):
    # In groups, A sees all channels, and B has for each group its own share of what A gives.
    A, B = whole(RANK, op.channels(IN) * math.prod(op.kernel)), whole(OUT, RANK // op.groups)
    x, product = given(op, *batch), torch.block_diag(*B.chunk(op.groups)) @ A
    assert torch.equal(op.mix(op.apply(x, A), B), op.apply(x, product))


@each_op
@pytest.mark.parametrize("batch", [(4,), (2, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_mixing_onto_is_adding_what_is_mixed(op: Op, batch: tuple[int, ...], dtype: torch.dtype):
    A, B = whole(RANK, op.channels(IN) * math.prod(op.kernel)), whole(OUT, RANK // op.groups)
    h = op.apply(given(op, *batch), A)
    mixed = op.mix(h, B)
    below = whole(*mixed.shape).to(dtype)
    assert torch.equal(op.mix_onto(below, h, B, -0.5), below - mixed / 2)
    assert torch.equal(op.mix_onto(below, h.to(dtype), B.to(dtype), 2.0), below + 2 * op.mix(h.to(dtype), B.to(dtype)))


@each_module
def test_the_module_is_recognised_and_one_that_computes_otherwise_is_not(name: str):
    module = MODULES[name](True)
    assert op_of(module) == EXAMPLES[name]
    for method in ("forward", "_conv_forward"):
        if method in dir(module):
            other = type("Other", (type(module),), {method: lambda *_: None})
            module.__class__ = other
            assert op_of(module) is None
            module.__class__ = other.__base__


@pytest.mark.parametrize("kind", [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d])
def test_a_transposed_convolution_is_none_of_ours(kind: type[nn.Module]):
    assert op_of(kind(2, 2, 1)) is None


@each_op
def test_only_numbers_take_dropout(op: Op):
    assert op.accepts_dropout() == given(op, 4).is_floating_point()
