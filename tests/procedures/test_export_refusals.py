"""export_onnx of modules that have no graph, write to what they hold, or cannot be compared."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgery


class Of(nn.Module):
    def __init__(self, does: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.does = does

    def forward(self, x: Tensor) -> Any:
        return self.does(x)


REFUSED: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "a branch on values": (lambda x: x if x.sum() > 0 else -x, r"1\.0: .*what it does depends on values \(Could not"),
    "an operator that ONNX lacks": (
        lambda x: torch.linalg.eigvals(x).real,
        r"1\.0 \(aten.linalg_eig.default\): .*knows no operator of ONNX for it",
    ),
    "a size that hangs on values": (lambda x: torch.linalg.lstsq(x, x)[0], r"1\.0: .*depends on values"),
    "an error of its own": (lambda x: {"b": x}["a"], r"1\.0: .*KeyError \('a'\); a module that torch.export can trace"),
    "an error without words": (lambda x: x * next(iter([])), r"1\.0: .*StopIteration; a module that"),
    "what is no tensor": (lambda x: {"a": x, "b": "text"}, "Sequential: .*the output b is a str; tensors are wanted"),
    "dropout in training": (lambda x: nn.functional.dropout(x, 0.5, True), r"1\.0: .*native_dropout.* draws random"),
    "random numbers": (lambda x: x + torch.rand(4, 4), r"1\.0: .*aten.rand.default draws random numbers"),
    "one random number": (lambda x: x * torch.randn(()).item(), r"1\.0: .*aten.randn.default draws random numbers"),
}


@pytest.mark.parametrize(("does", "told"), REFUSED.values(), ids=REFUSED.keys())
def test_what_has_no_graph_is_refused_in_one_line_that_names_its_module(
    does: Callable[[Tensor], Any], told: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(Of(does)))
    with pytest.raises(surgery.InputError, match=f"^{told}") as refused:
        surgery.export_onnx(model, None, tmp_path / "out", inputs=torch.ones(2, 4, 4))
    assert "\n" not in str(refused.value)
    assert "\x1b" not in str(refused.value)
    assert " --debug" not in str(refused.value).replace("`surgery --debug`", "")
    assert refused.value.__cause__ is not None or "raised from" not in str(refused.value)
    assert capfd.readouterr().err == ""
    assert list(tmp_path.iterdir()) == []


def test_what_draws_no_numbers_in_eval_mode_is_no_random_operator(tmp_path: Path) -> None:
    class Quiet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.dropout = nn.LSTM(4, 4, num_layers=2, dropout=0.5, batch_first=True), nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.dropout(self.lstm(x)[0])[:, None]
            return nn.functional.scaled_dot_product_attention(x, x, x, dropout_p=0.5 if self.training else 0.0)

    assert surgery.export_onnx(Quiet(), None, tmp_path / "out", inputs=torch.randn(2, 3, 4)).proof.ok


class Counting(nn.Module):
    """Multiplies by how often it has run."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("runs", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        return x * self.runs


def test_a_module_that_gives_other_outputs_when_it_runs_again_is_refused_as_such(tmp_path: Path) -> None:
    with pytest.raises(surgery.InputError, match="a Counting: its output output changes when it runs once more"):
        surgery.export_onnx(Counting(), None, tmp_path / "out", inputs=torch.randn(2, 4))
    assert list(tmp_path.iterdir()) == []


class Writing(nn.Module):
    """Changes a parameter as it runs."""

    def __init__(self, write: Callable[[nn.Module], Any]) -> None:
        super().__init__()
        self.runs, self.write = nn.Parameter(torch.zeros(2)), write

    def forward(self, x: Tensor) -> Tensor:
        self.write(self)
        return x * self.runs.sum()


def _in_place(module: Any) -> None:
    module.runs += 1


def _by_data(module: Any) -> None:
    module.runs.data.add_(1)


def _by_other_data(module: Any) -> None:
    module.runs.data = module.runs.data + 1


def _a_part(module: Any) -> None:
    module.runs.view(2, 1)[0].data[0] = 1


def _by_out(module: Any) -> None:
    torch.ones(2, out=module.runs.data)


def _in_a_list(module: Any) -> None:
    torch._foreach_add_([module.runs.data], 1.0)


@pytest.mark.parametrize("write", [_in_place, _by_data, _by_other_data, _a_part, _by_out, _in_a_list])
def test_a_module_that_writes_to_its_parameters_is_refused_and_stays_as_it_is(
    write: Callable[[nn.Module], Any], tmp_path: Path
) -> None:
    """By its .data, the exporter of torch would end the process with a segmentation fault."""
    model = nn.Sequential(Writing(write))
    with pytest.raises(surgery.InputError, match=r"^0\.runs: a parameter that the model writes to as it runs"):
        surgery.export_onnx(model, None, tmp_path / "out", inputs=torch.randn(2, 4))
    assert model[0].runs.tolist() == [0, 0]
    assert list(tmp_path.iterdir()) == []


class Keeping(nn.Module):
    """Keeps a table that it makes when it first runs."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        return x + self.kept.setdefault("table", torch.arange(4.0))


def test_a_table_that_a_module_makes_as_it_first_runs_has_its_numbers(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), Keeping())
    assert surgery.export_onnx(model, None, tmp_path / "out", inputs=torch.randn(2, 4)).proof.ok


BY_VALUES: dict[str, Callable[[Tensor], Tensor]] = {
    "a slice up to what values tell": lambda x: x[:, : int((x[0] > 0).sum())],
    "a slice from what values tell": lambda x: x[:, int((x[0] > 9).sum()) :],
    "what values pick": lambda x: x[x > 0],
    "numbers of float32 that it makes itself": lambda x: x @ torch.ones(4, 4),
}


@pytest.mark.parametrize("does", BY_VALUES.values(), ids=BY_VALUES.keys())
def test_sizes_that_hang_on_values_and_constants_are_exported(does: Callable[[Tensor], Tensor], tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), Of(does))
    assert surgery.export_onnx(model, None, tmp_path / "out", inputs=torch.randn(2, 6, 4)).proof.ok


NO_PROOF: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "empty": (lambda x: x[:, int((x > -99).sum()) :], r"1\.0: what it gives is empty for input \[1, 6, 4\]"),
    "of float32 alone": (lambda x: x @ torch.ones(4, 4, dtype=torch.float32), r"1\.0: it does not run in float64"),
}


@pytest.mark.parametrize(("does", "told"), NO_PROOF.values(), ids=NO_PROOF.keys())
def test_what_cannot_be_compared_is_refused_in_one_line_that_names_its_module(
    does: Callable[[Tensor], Tensor], told: str, tmp_path: Path
) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(Of(does)))
    with pytest.raises(surgery.InputError, match=f"^{told}") as refused:
        surgery.export_onnx(model, None, tmp_path / "out", inputs=torch.ones(2, 6, 4))
    assert "\n" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []
