"""Exports of models that do not fit the memory: compared with weights that are read as the layers run."""

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES
from torch import nn

import surgery
from surgery.formats.onnx.stored import Weights
from surgery.hosts.checkpoint import Checkpoint
from surgery.hosts.streamed import streamed
from surgery.hosts.twin import doubled, twin, weightless
from surgery.integrations.transformers.examples import example_for
from surgery.integrations.transformers.exporting import Pretrained, sources_of, without_weights
from surgery.procedures.exports import export
from surgery.procedures.exports.proof_by_layers import Files, bytes_by_layers
from surgery.procedures.exports.runs import prepared, runs

QUICK = ("mixtral", "t5", "vit")  # fused experts, a layer that asks for another's dtype, and renamed tensors
LITTLE = "600KB"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "base"
    torch.manual_seed(0)
    ARCHITECTURES["llama"]().to(torch.bfloat16).save_pretrained(folder, max_shard_size="100KB")
    return folder


def adapter(out: Path, **options: Any) -> Path:
    model = ARCHITECTURES["llama"]()
    surgery.save(surgery.inject(model, surgery.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], **options)), out)
    return out


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in ARCHITECTURES]
)
def test_a_model_read_from_its_files_gives_the_outputs_of_one_in_memory(name: str, tmp_path: Path) -> None:
    """To the bit, where they are numbers."""
    torch.manual_seed(0)
    model, prepare = ARCHITECTURES[name]().eval(), Pretrained().prepare
    model.save_pretrained(tmp_path / "base")
    with without_weights():
        empty = ARCHITECTURES[name]().eval()
    empty.tie_weights()
    example, plain = example_for(model), weightless(empty).module
    prepare(plain)
    with Checkpoint(tmp_path / "base") as files:
        sources = sources_of(plain, files)
        read = Files(files, export.names_in_files(plain, sources), sources.made)
        lean = prepared(streamed(empty, read, torch.float64), prepare)
        found = runs(lean, [example.inputs], example)[0]
    wanted = runs(prepared(twin(model, doubled), prepare), [example.inputs], example)[0]
    assert found.keys() == wanted.keys()
    for output, values in wanted.items():
        shown = values.isfinite()
        assert torch.equal(found[output][shown], values[shown]), output


def test_layers_that_read_the_weights_of_others_have_them() -> None:
    """Within the order of sums: with hooks upon it, torch computes such a layer in other kernels."""
    torch.manual_seed(0)
    layers = [nn.TransformerEncoderLayer(16, 2, 32, batch_first=True) for _ in range(2)]
    model = nn.Sequential(nn.Linear(16, 16), *layers, nn.BatchNorm1d(5), nn.Linear(16, 4)).eval()
    state, x = model.state_dict(), torch.randn(2, 5, 16).double()
    empty = twin(model, lambda held: held.to("meta"))
    lean = streamed(empty, lambda name, rows: state[name] if rows is None else state[name][rows], torch.float64)
    with torch.no_grad():
        found, wanted = lean(x), twin(model, doubled)(x)
    terms, products = 32, 12  # at most so many in a sum, and sums one after the other
    assert (found - wanted).abs().max() <= terms * products * torch.finfo(torch.float64).eps * wanted.abs().max()
    assert all(held.is_meta for held in lean.parameters())


def test_an_export_is_compared_layer_by_layer_where_the_model_does_not_fit(base: Path, tmp_path: Path) -> None:
    path = adapter(tmp_path / "adapter", init_lora_weights=False)
    proof = surgery.export_onnx(base, path, tmp_path / "out", max_memory=LITTLE).proof
    assert proof.by_layers
    assert proof.to_json()["by_layers"]
    assert [one.shapes["input_ids"] for one in proof.trials] == [(2, 6)]
    assert all(one.merged is not None and one.merged.outputs[0].effect > 0.1 for one in proof.trials)
    assert "in 1 runs layer by layer; not with the whole model in memory" in proof.summary()
    assert bytes_by_layers(ARCHITECTURES["llama"]()) < 600_000


def test_a_wrong_export_is_found_layer_by_layer(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = export.link
    one, other = (f"model.layers.{i}.self_attn.o_proj.weight" for i in (0, 1))

    def wrong(graph: Any, weights: Weights, *others: Any) -> None:
        stored = {**weights.stored, one: weights.stored[other], other: weights.stored[one]}
        link(graph, weights._replace(stored=stored), *others)

    monkeypatch.setattr(export, "link", wrong)
    with pytest.raises(surgery.CheckError, match="onnxruntime computes otherwise than the model"):
        surgery.export_onnx(base, None, tmp_path / "out", max_memory=LITTLE)
    assert list(tmp_path.iterdir()) == []


def test_adapters_without_effect_are_found_layer_by_layer(base: Path, tmp_path: Path) -> None:
    path = adapter(tmp_path / "adapter")
    with pytest.raises(surgery.CheckError, match="the adapter changes no output at all"):
        surgery.export_onnx(base, path, tmp_path / "out", max_memory=LITTLE)
    assert not (tmp_path / "out").exists()
