"""Exports of models of transformers that bitsandbytes has quantized: from files and in memory, and under adapters."""

import json
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

import surgery
from surgery.cli import main
from surgery.codecs.bnb8 import Bnb8
from surgery.hosts.checkpoint import Checkpoint
from surgery.integrations.transformers import export_files
from surgery.integrations.transformers.exporting import sources_of
from surgery.procedures.planning.treatment import HELD_IN

SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "vocab_size": 99}
KINDS = {
    "nf4-double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}
QUANTIZED = 7  # linear layers of the one decoder layer


@pytest.fixture(scope="module", params=["nf4-double", pytest.param("int8", marks=pytest.mark.slow)])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quantized base in bfloat16, and an adapter that was trained over it."""
    root = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    config = LlamaConfig(**SMALL, num_hidden_layers=1, initializer_range=0.3)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(root / "plain")
    settings = BitsAndBytesConfig(**KINDS[request.param])
    model = loaded(root / "plain", quantization_config=settings)
    model.save_pretrained(root / request.param)
    config = surgery.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    surgery.save(surgery.inject(model, config), root / "adapter")
    return root / request.param


def loaded(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **options).eval()


def operators(folder: Path) -> list[str]:
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    return [f"{node.domain} {node.op_type}".strip() for node in graph.node]


def decodes(folder: Path, kind: str) -> int:
    """How many layers the graph decodes from codes."""
    return operators(folder).count("com.microsoft MatMulBnb4" if kind == "nf4-double" else "DequantizeLinear")


def test_a_quantized_base_is_exported_over_its_own_codes(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as ended:
        main(["export", str(base), str(out), "--kv", "--json"])
    assert not ended.value.code
    assert json.loads(capsys.readouterr().out)["proof"]["ok"]
    assert (out / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()
    assert decodes(out, base.name) == QUANTIZED
    assert (out / "model.onnx.data").exists() == (base.name == "nf4-double")
    assert surgery.verify_checkpoint(out).ok


def test_adapters_are_put_into_slots_beside_the_codes(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = surgery.export_onnx(base, base.parent / "adapter", out, swappable=True)
    assert [one.adapter for one in report.proof.trials] == [""] * 3 + ["adapter"] * 3
    assert decodes(out, base.name) == QUANTIZED
    found, wanted = load_file(out / "model.safetensors"), load_file(base / "model.safetensors")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name].flatten(), values.flatten()) for name, values in wanted.items())
    assert json.loads((out / "config.json").read_text())["quantization_config"]["quant_method"] == "bitsandbytes"


@pytest.mark.parametrize(("into", "codes"), [pytest.param(None, 0, marks=pytest.mark.slow), ("keep", QUANTIZED)])
def test_adapters_are_merged_into_16_bits_or_into_the_codes(
    base: Path, into: str | None, codes: int, tmp_path: Path
) -> None:
    report = surgery.export_onnx(base, base.parent / "adapter", tmp_path / "out", into=into)
    assert decodes(tmp_path / "out", base.name) == codes
    assert all((one.adapted is None) == bool(codes) for one in report.proof.trials)
    assert ("receipt" in report.proof.left_out) == bool(codes)


@pytest.mark.slow
def test_a_quantized_model_in_memory_is_exported_as_it_is_or_merged(base: Path, tmp_path: Path) -> None:
    model = loaded(base)
    surgery.export_onnx(model, None, tmp_path / "kept")
    assert decodes(tmp_path / "kept", base.name) == QUANTIZED
    surgery.load(model, base.parent / "adapter")
    surgery.export_onnx(model, None, tmp_path / "slots", swappable=True)
    assert decodes(tmp_path / "slots", base.name) == QUANTIZED
    report = surgery.export_onnx(model, None, tmp_path / "merged")
    assert decodes(tmp_path / "merged", base.name) == 0
    assert all(one.adapted is not None for one in report.proof.trials)


@pytest.mark.slow
@pytest.mark.parametrize("into", ["nf4", "fp4", "int8"])
def test_a_plain_base_is_quantized_as_it_is_exported(base: Path, into: str, tmp_path: Path) -> None:
    surgery.export_onnx(base.parent / "plain", None, tmp_path / "out", into=into, portable=True)
    assert not any(op.startswith("com.microsoft") for op in operators(tmp_path / "out"))
    assert operators(tmp_path / "out").count("DequantizeLinear") == (QUANTIZED if into == "int8" else 0)


def test_formats_that_no_graph_holds_are_refused(base: Path, tmp_path: Path) -> None:
    held = {"nf4", "nf4-double", "fp4", "fp4-double", "int8"}
    for into in [form for form in HELD_IN if form not in held]:
        with pytest.raises(surgery.UsageError, match=f"{into}`, which no graph here decodes"):
            surgery.export_onnx(base.parent / "plain", None, tmp_path / "out", into=into)
    assert list(tmp_path.iterdir()) == []


def test_codes_of_experts_that_transformers_joins_are_refused(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    model = MixtralForCausalLM(MixtralConfig(**sizes, num_hidden_layers=1, vocab_size=9, num_local_experts=2))
    model.save_pretrained(tmp_path / "base")
    path = tmp_path / "base" / "model.safetensors"
    tensors = load_file(path)
    name = next(one for one in tensors if ".experts.1." in one)
    codes = Bnb8().fresh(tensors.pop(name), {}).tensors
    tensors |= {name.removesuffix(".weight") + Bnb8.endings[role]: values for role, values in codes.items()}
    save_file(tensors, path, {"format": "pt"})
    wrong = pytest.raises(surgery.FormatError, match=rf"^{name}: held in codes, .* export it into 16bit")
    with Checkpoint(tmp_path / "base") as files, wrong:
        sources_of(model, files)


@pytest.mark.parametrize("into", [None, pytest.param("16bit", marks=pytest.mark.slow)])
def test_no_bitsandbytes_is_needed(
    base: Path, into: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What stays in codes is compared layer by layer then, and what is merged with the merged weights alone."""
    monkeypatch.setattr(export_files, "find_spec", lambda _: None)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    path = None if into is None else base.parent / "adapter"
    proof = surgery.export_onnx(base, path, tmp_path / "out", into=into).proof
    assert proof.by_layers == (into is None)
    assert "bitsandbytes is missing" in proof.left_out
