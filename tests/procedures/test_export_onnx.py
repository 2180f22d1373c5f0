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
