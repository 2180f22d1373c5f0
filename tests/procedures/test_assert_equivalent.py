"""assert_equivalent tells models that differ by rounding from models that differ."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import surgery
from surgery.core.agreement import FACTOR
from surgery.core.distance import Distance
from surgery.testing import assert_equivalent

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def net(dtype: torch.dtype = torch.float32, width: int = 64) -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Linear(width, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, 10)
    return nn.Sequential(*layers).to(dtype)


def inputs(dtype: torch.dtype = torch.float32, width: int = 64) -> Tensor:
    return torch.randn(20, width, generator=torch.Generator().manual_seed(1)).to(dtype)


def adapted(model: nn.Module, **fields: Any) -> nn.Module:
    torch.manual_seed(2)
    config = surgery.LoraConfig(r=4, lora_alpha=8, target_modules=["0", "2"], init_lora_weights=False, **fields)
    return surgery.inject(model, config)


def in_a_chain(model: nn.Sequential) -> Callable[[Tensor], Tensor]:
    """The same by other kernels: each sum of a linear taken one term after the other."""

    def linear(layer: nn.Linear, x: Tensor) -> Tensor:
        total = torch.zeros(len(x), layer.out_features, dtype=x.dtype)
        for column in range(layer.in_features):
            total = total + x[:, column, None] * layer.weight[:, column]
        return total + layer.bias

    def call(x: Tensor) -> Tensor:
        for layer in model:
            x = linear(layer, x) if isinstance(layer, nn.Linear) else layer(x)
        return x

    return call


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_other_kernels_are_equivalent_and_one_wrong_weight_is_not(dtype: torch.dtype) -> None:
    model, x = net(dtype), inputs(dtype)
    assert_equivalent(model, in_a_chain(model), x)
    assert_equivalent(in_a_chain(model), model, x)
    wrong = net(dtype)
    with torch.no_grad():
        wrong[2].weight[0] += 300 * torch.finfo(dtype).eps
    with pytest.raises(AssertionError, match="not equivalent"):
        assert_equivalent(model, wrong, x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_merged_model_is_equivalent_to_the_adapted_one_and_the_base_is_not(dtype: torch.dtype) -> None:
    model, x = adapted(net(dtype)), inputs(dtype)
    merged = surgery.merge(adapted(net(dtype)))
    assert_equivalent(model, merged, x, base=net(dtype))
    with pytest.raises(AssertionError, match="not equivalent"):
        assert_equivalent(model, net(dtype), x)


def test_an_adapter_that_changes_nothing_is_not_passed() -> None:
    fresh = surgery.inject(net(), surgery.LoraConfig(r=4, target_modules=["0"]))
    assert_equivalent(fresh, net(), inputs())
    with pytest.raises(AssertionError, match="the adapter changes no output"):
        assert_equivalent(fresh, net(), inputs(), base=net())
    with pytest.raises(AssertionError, match="the adapter changes no output"):
        assert_equivalent(fresh, net(), inputs(), base=lambda x: net(torch.float64)(x.double()))


@pytest.mark.parametrize(
    "outcome",
    [
        lambda y: {"logits": y, "none": None, "deep": (y[0], [y[1], y])},
        lambda y: (y, (y,)),
        lambda y: [y.numpy(), {"part": y[0].numpy()}] if y.dtype == torch.float32 else [y, {"part": y[0]}],
        lambda y: {"mean": float(y.mean()), "count": 3},
    ],
)
def test_outcomes_of_any_form_are_compared_leaf_by_leaf(outcome: Callable[[Tensor], Any]) -> None:
    def of(model: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Any]:
        return lambda x: outcome(model(x).detach())

    exact = of(net(torch.float64))
    assert_equivalent(of(net()), of(in_a_chain(net())), inputs(), exact=exact)
    with pytest.raises(AssertionError, match="not equivalent"):
        assert_equivalent(of(net()), of(net(width=64)[:-1].append(nn.Linear(64, 10))), inputs(), exact=exact)


class Both(nn.Module):
    """Takes arrays of two kinds by name or place."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: Tensor, scale: Tensor, times: int = 1) -> tuple[Tensor, object]:
        return self.net(x) * scale * times, object()


@pytest.mark.parametrize(
    "given", [(inputs(), torch.ones(20, 1), 2), {"x": inputs(), "scale": torch.tensor(2)}], ids=len
)
def test_inputs_are_one_argument_or_several_or_by_name(given: Any) -> None:
    assert_equivalent(Both(), Both(), given)
    wrong = Both()
    wrong.net[0].weight.data[0] = 0
    with pytest.raises(AssertionError, match=r"not compared: 1 \(object\)"):
        assert_equivalent(Both(), wrong, given)


def test_a_model_without_floats_takes_the_dtype_of_its_inputs() -> None:
    assert_equivalent(nn.Softmax(1), lambda x: x.exp() / x.exp().sum(1, keepdim=True), inputs())
    with pytest.raises(AssertionError):
        assert_equivalent(nn.Softmax(1), lambda x: x.half().softmax(1), inputs())


def test_models_stay_as_they_are() -> None:
    model = nn.Sequential(net(), nn.Dropout(0.5), nn.BatchNorm1d(10))
    model[0].eval()
    before = {name: values.clone() for name, values in model.state_dict().items()}
    assert_equivalent(model, model, inputs())
    assert [module.training for module in model] == [False, True, True]
    assert all(torch.equal(values, before[name]) for name, values in model.state_dict().items())
    assert all(values.grad is None for values in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_without_a_module_the_noise_cannot_be_measured() -> None:
    with pytest.raises(surgery.UsageError, match="give exact"):
        assert_equivalent(torch.sin, np.sin, inputs())
    assert_equivalent(torch.sin, lambda x: np.sin(x.numpy()), inputs(), exact=torch.sin)


def test_what_a_model_makes_of_padding_is_not_compared() -> None:
    class Rows(nn.Module):
        def __init__(self, wrong: int) -> None:
            super().__init__()
            self.embed, self.wrong = nn.Embedding(9, 4), wrong
            nn.init.ones_(self.embed.weight)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
            noise = self.wrong * (attention_mask == 0)[..., None]
            return {"last": self.embed(input_ids) + noise}

    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    given = {"input_ids": torch.ones_like(mask), "attention_mask": mask}
    assert_equivalent(Rows(0), Rows(1), given)
    for rows in (torch.ones(2, 4), mask.flip(0)):
        with pytest.raises(AssertionError):
            assert_equivalent(Rows(0), Rows(1), given, rows=rows)


def test_an_error_that_grows_by_a_factor_is_scaled_in_all_measures() -> None:
    assert Distance(1.0, 1.0, 1.0, 1.0).scaled(FACTOR) == Distance(8.0, 64.0, 64.0, 64.0)


def test_an_outcome_that_is_no_tensor_and_that_only_one_gives_is_told() -> None:
    model, x = torch.nn.Linear(4, 4), torch.randn(3, 4)
    with pytest.raises(AssertionError, match="only one of the two gives"):
        assert_equivalent(model, lambda x: (model(x), object()), x)
