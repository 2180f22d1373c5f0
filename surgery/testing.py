"""For the test suites of others: that two models give the same outputs."""

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor, nn

from surgery.core.agreement import Outputs, compare, floors
from surgery.core.distance import Distance
from surgery.errors import UsageError
from surgery.integrations.transformers import run_experts_singly
from surgery.procedures.checking.outputs import Given, Inputs, Runs, calibrated, mask_of, run, twin, widened

__all__ = ["assert_equivalent"]


def assert_equivalent(  # noqa: PLR0913  # two models and what bears on them
    a: Runs,
    b: Runs,
    inputs: Inputs,
    *,
    base: Runs | None = None,
    exact: Runs | None = None,
    rows: Tensor | None = None,
) -> None:
    """AssertionError, with a table of the errors, unless `b` gives the outputs of `a`, to the noise of their dtype.

    Either is a module or any callable; its outcome a tensor, an array, or tuples and mappings of them, such as a
    ModelOutput. `inputs` are one tensor, a sequence of arguments, or a mapping of keyword arguments. Modules are run
    in eval mode, and stay as they are.

    The noise is measured: that of the run of `a`, or else of `b`, from its run in float64; `exact` is what runs in
    float64 where neither is a module, and is given floats in float64. An error of up to 8 times the noise passes.
    `base` is the model without the adapter: its difference from `a` must be 4 times the error at least, and no noise
    counts as less than 2^-20 of it, which is what the grid of our exact merges may leave open in float64. `rows`
    is a mask [batch, ...] of the outputs' first axes, by default the inputs' attention_mask [batch, seq]:
    what a model makes of padding is not compared.

    >>> import torch
    >>> from surgery.testing import assert_equivalent
    >>> model, x = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh()), torch.randn(4, 8)
    >>> assert_equivalent(model, lambda x: torch.tanh(x @ model[0].weight.T + model[0].bias), x)
    >>> assert_equivalent(model, lambda x: torch.tanh(x @ model[0].weight.T), x)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
        ...
    AssertionError: the outputs are not equivalent
    ...
    """
    if exact is None and not isinstance(a, nn.Module):
        a, b = b, a  # the noise is that of a module
    rows, wide = mask_of(inputs) if rows is None else rows, widened(inputs)
    truth, floor = _measured(a, exact, inputs, rows)
    plain = None if base is None else _exactly(base, inputs, wide)
    other = run(b, inputs)
    if {*truth.left_out} != {*other.left_out}:
        apart = ", ".join(sorted({*truth.left_out} ^ {*other.left_out}))
        raise AssertionError(f"the outputs are not equivalent: only one of the two gives {apart}, which is no tensor")
    found = compare(truth.outputs, other.outputs, floor, plain, rows)
    if not found.ok:
        what = found.why if all(one.ok for one in found.outputs) else "the outputs are not equivalent"
        raise AssertionError(f"{what}\n\n{replace(found, left_out=truth.left_out).table()}")


def _measured(a: Runs, exact: Runs | None, inputs: Inputs, rows: Tensor | None) -> tuple[Given, Mapping[str, Distance]]:
    """What is right, in float64, and the noise of each output of `a`."""
    wide = widened(inputs)
    if exact is not None:
        truth = run(exact, wide)
        return truth, floors(run(a, inputs).outputs, truth.outputs, rows)
    if isinstance(a, nn.Module):
        truth = run(_in_float64(a), wide)
        return truth, calibrated(a, inputs, truth.outputs, rows)
    raise UsageError("assert_equivalent: neither is a module, so that no noise can be measured; give exact")


def _exactly(model: Runs, inputs: Inputs, wide: Inputs) -> Outputs:
    """In float64, where it is a module."""
    return (run(_in_float64(model), wide) if isinstance(model, nn.Module) else run(model, inputs)).outputs


def _in_float64(model: nn.Module) -> nn.Module:
    copied = twin(model)
    run_experts_singly(copied)
    return copied
