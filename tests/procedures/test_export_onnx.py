"""export_onnx of modules in memory: what is linked, what onnxruntime computes, and what is refused."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import onnx
import onnxruntime
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import surgery
from surgery.cli import main
from surgery.formats.onnx.stored import Weights
from surgery.procedures.exports import export
from surgery.procedures.exports.proof import Trial


class Net(nn.Module):
    """An embedding that a head is tied to, buffers that are stored, and adapted linears."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.inner, self.norm = nn.Embedding(30, 16), nn.Linear(16, 32), nn.BatchNorm1d(32)
        self.head, self.tied = nn.Linear(32, 30), nn.Linear(16, 30, bias=False)
        self.tied.weight = self.embed.weight
        self.norm.running_mean.uniform_()

    def forward(self, ids: Tensor, scale: Tensor) -> dict[str, Tensor]:
        found = self.embed(ids)
        inner = self.norm(torch.relu(self.inner(found)).transpose(1, 2)).transpose(1, 2)
        return {"logits": self.head(inner) * scale, "pooled": self.tied(found).mean(1)}


AXES = {"ids": {0: "batch", 1: "seq"}, "scale": {0: "batch", 1: "seq"}}
INPUTS = (torch.randint(0, 30, (2, 6), generator=torch.Generator().manual_seed(0)), torch.ones(2, 6, 1))


def adapted(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    model = surgery.inject(Net().eval().to(dtype), surgery.LoraConfig(r=4, target_modules=["inner", "head"]))
    for name, values in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(values, std=0.3)
    return model


def initializers(out: Path) -> list[onnx.TensorProto]:
    return list(onnx.load(out / "model.onnx", load_external_data=False).graph.initializer)


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16, torch.float16], ids=str)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path, Any]:
    out = tmp_path_factory.mktemp("export") / "out"
    model = adapted(request.param)
    before = {name: values.clone() for name, values in model.state_dict().items()}
    report = surgery.export_onnx(model, None, out, inputs=INPUTS, dynamic_axes=AXES)
    assert all(torch.equal(values, before[name]) for name, values in model.state_dict().items())
    return model, out, report


def test_every_weight_is_the_bytes_of_the_safetensors_file(exported: tuple[nn.Module, Path, Any]) -> None:
    _, out, _ = exported
    data, merged = (out / "model.safetensors").read_bytes(), load_file(out / "model.safetensors")
    linked = {one.name.removeprefix("weights/"): one for one in initializers(out) if one.external_data}
    assert set(linked) == merged.keys() - {"norm.num_batches_tracked", "tied.weight"}
    for name, one in linked.items():
        told = {entry.key: entry.value for entry in one.external_data}
        assert told["location"] == "model.safetensors"
        start, size = int(told["offset"]), int(told["length"])
        assert data[start : start + size] == merged[name].contiguous().view(torch.uint8).numpy().tobytes()
    assert sum(one.ByteSize() for one in initializers(out) if not one.external_data) < 100
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "model.onnx", "model.safetensors"]


def test_the_weights_are_those_of_merge(exported: tuple[nn.Module, Path, Any]) -> None:
    model, out, _ = exported
    surgery.merge(model)
    held = {name.replace("base_layer.", ""): values for name, values in model.state_dict().items()}
    with safe_open(out / "model.safetensors", "pt") as file:
        assert all(torch.equal(file.get_tensor(name), held[name]) for name in file.keys())  # noqa: SIM118
    surgery.unmerge(model)


def test_onnxruntime_computes_what_the_adapted_model_does(exported: tuple[nn.Module, Path, Any]) -> None:
    model, out, report = exported
    ids, scale = torch.randint(0, 30, (5, 3)), torch.rand(5, 3, 1)
    session = onnxruntime.InferenceSession(str(out / "model.onnx"))
    found = dict(
        zip(
            [one.name for one in session.get_outputs()],
            session.run(None, {"ids": ids.numpy(), "scale": scale.numpy()}),
            strict=True,
        )
    )
    dtype = next(model.parameters()).dtype
    with torch.no_grad():
        wanted = model(ids, scale.to(dtype))
    eps = torch.finfo(dtype).eps
    for name, values in wanted.items():  # at most 32 + 16 + 4 products are added on the way, each rounded
        error = numpy.abs(found[name] - values.float().numpy()).max()
        assert error <= 52 * eps * values.abs().max().item()
    assert report.proof.ok
    trials: list[Trial] = list(report.proof.trials)
    assert {one.shapes["ids"] for one in trials} == {(1, 6), (2, 6), (4, 8)}
    assert all(one.adapted is not None and max(o.effect or 0 for o in one.adapted.outputs) > 0.1 for one in trials)


def test_a_graph_that_computes_otherwise_is_not_put_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = export.link

    def wrong(graph: Any, weights: Weights, *others: Any) -> None:
        stored = dict(weights.stored)
        stored["norm.weight"], stored["norm.bias"] = stored["norm.bias"], stored["norm.weight"]
        link(graph, weights._replace(stored=stored), *others)

    monkeypatch.setattr(export, "link", wrong)
    with pytest.raises(surgery.CheckError, match=r"onnxruntime computes otherwise than the model, for ids \[1, 6\]"):
        surgery.export_onnx(adapted(), None, tmp_path / "out", inputs=INPUTS, dynamic_axes=AXES)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda stored: {name: one for name, one in stored.items() if name != "head.bias"}, "head.bias: no tensor"),
        (lambda stored: {**stored, "head.bias": stored["inner.bias"]}, r"head.bias: it is stored as \[32\].*\[30\]"),
        (
            lambda stored: {
                **stored,
                "head.bias": stored["head.bias"]._replace(info=stored["head.bias"].info._replace(dtype=torch.int32)),
            },
            "head.bias: it is stored in torch.int32, the graph wants FLOAT; .* `surgery inspect`",
        ),
    ],
    ids=["absent", "shape", "dtype"],
)
def test_a_weight_that_cannot_be_linked_is_named(
    change: Callable[[Any], Any], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = export.link
    monkeypatch.setattr(export, "link", lambda g, w, *others: link(g, w._replace(stored=change(w.stored)), *others))
    with pytest.raises(surgery.FormatError, match=told):
        surgery.export_onnx(adapted(), None, tmp_path / "out", inputs=INPUTS, dynamic_axes=AXES)
    assert list(tmp_path.iterdir()) == []


def test_verify_finds_a_link_that_a_rewritten_file_has_broken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    surgery.export_onnx(nn.Linear(4, 2), None, out, inputs=torch.ones(2, 4))
    assert surgery.verify_checkpoint(out).ok
    save_file(load_file(out / "model.safetensors"), out / "model.safetensors", {"another": "header"})
    with pytest.raises(SystemExit) as ended:
        main(["verify", str(out)])
    assert ended.value.code == 4
    assert "its header is not the one that model.onnx points into" in capsys.readouterr().err


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


class Shrinking(nn.Module):
    """Does another thing with large batches."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.shape[0] < 10 else 2 * x


def test_a_module_that_does_another_thing_beyond_some_size_is_refused(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), Shrinking())
    with pytest.raises(surgery.InputError, match="hold up to a size of 9 along an axis"):
        surgery.export_onnx(model, None, tmp_path / "out", inputs=torch.ones(3, 4))
    assert list(tmp_path.iterdir()) == []


class Positions(nn.Module):
    """Has places for 6 numbers, and refuses more by itself, as CLIP's text model does."""

    def __init__(self, says_so: bool) -> None:
        super().__init__()
        self.says_so, self.places = says_so, nn.Parameter(torch.randn(6, 4))

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] > 6:
            if self.says_so:
                raise ValueError("too many")
            return x
        return x + self.places[: x.shape[1]]


def test_a_module_that_refuses_larger_sizes_itself_is_exported_up_to_these(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 4)
    surgery.export_onnx(Positions(True), None, tmp_path / "out", inputs=x, dynamic_axes={"x": {1: "seq"}})
    with pytest.raises(surgery.InputError, match="hold up to a size of 6 along an axis"):
        surgery.export_onnx(Positions(False), None, tmp_path / "other", inputs=x, dynamic_axes={"x": {1: "seq"}})


class Beside(nn.Module):
    """Its second input is one longer than the first; beyond 6 it does another thing."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y[:, 1:] if x.shape[1] <= 6 else x - y[:, 1:]


def test_a_size_that_hangs_on_another_one_is_tried_with_it(tmp_path: Path) -> None:
    given, axes = {"x": torch.randn(2, 3, 4), "y": torch.randn(2, 4, 4)}, {"x": {1: "seq"}, "y": {1: "longer"}}
    with pytest.raises(surgery.InputError, match=r"hold up to a size of [67] along an axis"):
        surgery.export_onnx(Beside(), None, tmp_path / "out", inputs=given, dynamic_axes=axes)


class TwoReadings(nn.Module):
    """Two buffers on one memory, in two dtypes."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.register_buffer("bits", torch.ones(4).view(torch.int32))
        self.register_buffer("floats", self.bits.view(torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + self.floats


def test_buffers_that_read_one_memory_in_two_dtypes_are_both_written(tmp_path: Path) -> None:
    surgery.export_onnx(TwoReadings(), None, tmp_path / "out", inputs=torch.ones(3, 4))
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written["floats"].tolist() == [1.0] * 4
    assert written["bits"].dtype == torch.int32


class OfOneSize(nn.Module):
    """Runs for one size of its second axis alone."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.weight[: x.shape[0]]


@pytest.mark.parametrize(
    ("options", "kind", "told"),
    [
        ({}, surgery.UsageError, "inputs are wanted, as forward takes them"),
        ({"inputs": {"y": torch.ones(2, 6)}}, surgery.UsageError, "forward has no parameter 'y'"),
        ({"inputs": torch.ones(2, 6), "weights": "move"}, surgery.UsageError, "link or copy is wanted"),
        ({"inputs": torch.ones(2, 6), "names": "olive"}, surgery.UsageError, "hf or genai is wanted"),
        ({"kv": True}, surgery.UsageError, "a decoder of transformers alone has a cache"),
        ({"inputs": (1,)}, surgery.UsageError, "a tensor is wanted"),
        ({"inputs": torch.ones(2, 6), "dynamic_axes": {"z": {0: "batch"}}}, surgery.UsageError, "no input 'z'"),
        ({"inputs": torch.ones(2, 6), "dynamic_axes": {"x": {7: "batch"}}}, surgery.UsageError, "on axis 7"),
        (
            {"inputs": torch.ones(2, 6), "dynamic_axes": {"x": {1: "seq"}}},
            surgery.InputError,
            "size alone, 6 along seq",
        ),
    ],
)
def test_inputs_that_cannot_be_are_refused(
    options: dict[str, Any], kind: type[Exception], told: str, tmp_path: Path
) -> None:
    with pytest.raises(kind, match=told):
        surgery.export_onnx(OfOneSize(), None, tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_told_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(surgery.EnvironmentFault, match=r"onnxruntime is missing; pip install .model-surgery\[onnx\]"):
        surgery.export_onnx(nn.Linear(4, 2), None, tmp_path / "out", inputs=torch.ones(2, 4))


def test_a_graph_tells_nothing_of_the_machine(tmp_path: Path) -> None:
    surgery.export_onnx(nn.Linear(4, 2), None, tmp_path / "out", inputs=torch.ones(2, 4))
    graph = (tmp_path / "out" / "model.onnx").read_bytes()
    assert b"/" not in graph.replace(b"weights/", b"")
    told = {one.key: one.value for one in onnx.load_model_from_string(graph).metadata_props}
    assert list(json.loads(told["surgery.header_sha256"])) == ["model.safetensors"]


def test_a_graph_with_a_copy_of_its_weights_can_be_shipped_alone(tmp_path: Path) -> None:
    report = surgery.export_onnx(adapted(), None, tmp_path / "out", inputs=INPUTS, dynamic_axes=AXES, weights="copy")
    assert list(report.weights) == ["model.onnx.data"]
    (tmp_path / "alone").mkdir()
    for name in ("model.onnx", "model.onnx.data"):
        (tmp_path / "out" / name).rename(tmp_path / "alone" / name)
    assert surgery.verify_checkpoint(tmp_path / "alone").ok
    onnxruntime.InferenceSession(str(tmp_path / "alone" / "model.onnx"))


def test_the_readme_of_the_folder_opens_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = surgery.inject(
        nn.Sequential(nn.Linear(4, 2)), surgery.LoraConfig(target_modules=["0"], init_lora_weights=False)
    )
    surgery.export_onnx(model, None, tmp_path / "out", inputs=torch.ones(2, 4), swappable=True)
    monkeypatch.chdir(tmp_path / "out")
    blocks = re.findall(r"```python\n(.*?)```", Path("README.md").read_text(), flags=re.DOTALL)
    names: dict[str, Any] = {}
    for block in blocks:
        exec(block, names)
    x = torch.randn(3, 4)
    with torch.no_grad():
        wanted = model(x).numpy()
    found = names["session"].run(None, {"input": x.numpy()}, names["run"])[0]
    # 4 + 8 products are added, each rounded
    assert numpy.abs(found - wanted).max() <= 12 * torch.finfo(torch.float32).eps * numpy.abs(wanted).max()
