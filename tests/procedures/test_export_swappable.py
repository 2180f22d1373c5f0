"""Exports with slots: what the graph is without adapters, what each does, and what no slot can hold."""

from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import surgery
from surgery.formats.onnx.runtime import run


def base() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(30, 8), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()


def test_adapters_of_other_ranks_and_layers_are_put_into_the_slots_of_one_graph(tmp_path: Path) -> None:
    """One has a rank of its own at the second layer, the other lacks the first."""
    model, ids = base(), torch.randint(30, (2, 3))
    surgery.export_onnx(model, None, tmp_path / "plain", inputs=ids)
    first = surgery.LoraConfig(r=4, target_modules=["1", "3"], rank_pattern={"3": 2}, init_lora_weights=False)
    second = surgery.LoraConfig(r=6, use_rslora=True, target_modules=["3"], init_lora_weights=False)
    surgery.inject(model, first)
    surgery.inject(model, second, adapter_name="b")
    out = tmp_path / "out"
    report = surgery.export_onnx(model, None, out, inputs=ids, swappable=True)
    assert report.proof.ok
    assert [one.adapter for one in report.proof.trials] == [""] * 3 + ["default"] * 3 + ["b"] * 3
    assert sorted(path.name for path in out.glob("*.onnx_adapter")) == ["b.onnx_adapter", "default.onnx_adapter"]
    trials = [{"input": torch.randint(30, (rows, 3))} for rows in (1, 4)]
    slotted, plain = run(out / "model.onnx", trials), run(tmp_path / "plain" / "model.onnx", trials)
    assert all(torch.equal(one["output"], other["output"]) for one, other in zip(slotted, plain, strict=True))
    graph = onnx.load(out / "model.onnx", load_external_data=False).graph
    ranks = {one.name: [axis.dim_param for axis in one.type.tensor_type.shape.dim] for one in graph.input[1:]}
    assert ranks["1.lora_A.weight"][1] == ranks["1.lora_B.weight"][0] == "1.rank"
    assert ranks["3.lora_A.weight"][1] == "3.rank"
    adapter = onnxruntime.AdapterFormat.read_adapter(str(out / "b.onnx_adapter")).get_parameters()
    assert {name: values.shape() for name, values in adapter.items()} == {
        "3.lora_A.weight": [16, 6],
        "3.lora_B.weight": [6, 4],
    }


def test_every_method_that_adds_a_product_has_slots(tmp_path: Path) -> None:
    """AdaLoRA's is B (E A)."""
    config = surgery.AdaLoraConfig(
        init_r=3, target_r=2, total_step=10, lora_alpha=4, target_modules=["1"], init_lora_weights=False
    )
    model, out = surgery.inject(base(), config), tmp_path / "out"
    report = surgery.export_onnx(model, None, out, inputs=torch.randint(30, (2, 3)), swappable=True)
    assert [one.adapter for one in report.proof.trials] == [""] * 3 + ["default"] * 3
    adapter = onnxruntime.AdapterFormat.read_adapter(str(out / "default.onnx_adapter")).get_parameters()
    assert adapter["1.lora_A.weight"].shape() == [8, 3]


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (surgery.LoraConfig(r=2, target_modules=["1"], use_dora=True), "1: adapter 'default' is DoRA there"),
        (surgery.IA3Config(target_modules=["1"], feedforward_modules=[]), "1: adapter 'default' is IA3"),
        (surgery.LoraConfig(r=2, target_modules=["0"]), "0: its op is embedding"),
        (surgery.LoraConfig(r=2, target_modules=["1"], modules_to_save=["3"]), "3: a module of modules_to_save"),
    ],
)
def test_what_no_slot_can_hold_is_refused(config: object, told: str, tmp_path: Path) -> None:
    model = surgery.inject(base(), config)
    with pytest.raises(surgery.MatchError, match=f"{told}.*export it merged"):
        surgery.export_onnx(model, None, tmp_path / "out", inputs=torch.randint(30, (2, 3)), swappable=True)
    assert list(tmp_path.iterdir()) == []
