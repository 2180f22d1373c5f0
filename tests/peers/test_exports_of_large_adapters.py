"""Exports of adapters that dwarf their base: a right graph is proved, one of a wrong merge is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import surgery
from surgery.core.agreement import Agreements
from surgery.core.arithmetic import float_product
from surgery.methods.lora import Lora
from surgery.procedures.checking import exactly

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2}
FIELDS = {"r": 4, "lora_alpha": 256, "target_modules": "all-linear", "init_lora_weights": False}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def adapted(dtype: torch.dtype, folder: Path, **fields: Any) -> LlamaForCausalLM:
    """Of which a base and an adapter are in the folder."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).to(dtype)
    model.save_pretrained(folder / "base")
    surgery.inject(model, surgery.LoraConfig(**FIELDS | fields))
    surgery.save(model, folder / "adapter")
    return model


def in_memory(model: LlamaForCausalLM, folder: Path) -> surgery.ExportReport:
    return surgery.export_onnx(model, None, folder / "out")


def from_files(model: LlamaForCausalLM, folder: Path) -> surgery.ExportReport:
    del model
    return surgery.export_onnx(folder / "base", folder / "adapter", folder / "out")


def plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if an exact merge were an ideal one."""
    monkeypatch.setattr(exactly, "held_product", float_product)
    monkeypatch.setattr(exactly, "held_rounding", lambda values, _: values)


@pytest.mark.parametrize(
    ("export", "dtype"),
    [
        pytest.param(in_memory, torch.float32, marks=pytest.mark.slow),
        (in_memory, torch.bfloat16),
        pytest.param(from_files, torch.bfloat16, marks=pytest.mark.slow),
    ],
    ids=["memory, float32", "memory, bfloat16", "files, bfloat16"],
)
def test_a_right_graph_is_proved_by_what_is_known_of_an_exact_merge(
    export: Callable[..., surgery.ExportReport], dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted(dtype, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Agreements, "settled", lambda told, _: told)
        with pytest.raises(surgery.CheckError, match=r"8 floors|noise floor"):
            export(model, tmp_path)
    report = export(model, tmp_path)
    assert report.proof.ok
    assert all(one.adapted is not None and one.adapted.stands_out for one in report.proof.trials)


@DTYPES
@pytest.mark.parametrize("by", [1 - 2.0**-5, pytest.param(-1, marks=pytest.mark.slow)], ids=["weaker", "turned"])
def test_a_graph_of_a_wrong_merge_is_refused(
    by: float, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layers of a Llama run by activations, which know nothing of deltas."""
    model, right = adapted(dtype, tmp_path), Lora.delta
    monkeypatch.setattr(Lora, "delta", lambda *given: right(*given) * by)
    with pytest.raises(surgery.CheckError, match="onnxruntime computes otherwise than the model"):
        in_memory(model, tmp_path)
    assert not (tmp_path / "out").exists()


def test_it_is_the_rounding_of_the_merged_weights_that_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plainly(monkeypatch)
    with pytest.raises(surgery.CheckError, match="8 floors"):
        in_memory(adapted(torch.bfloat16, tmp_path), tmp_path)
