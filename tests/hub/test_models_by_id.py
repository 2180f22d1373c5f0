"""Models and configs by the id of an adapter on the Hub, and adapters in a folder of a repository."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from fake_hub import FakeHub, Files
from huggingface_hub import constants
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import surgery
from surgery.io.hub import located

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99}


def files(folder: Path) -> Files:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(autouse=True)
def asked_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers keeps the address of the Hub that it asked first."""
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)


@pytest.fixture
def model(tmp_path: Path) -> Any:
    torch.manual_seed(0)
    found = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    found.save_pretrained(tmp_path / "base")
    config = surgery.LoraConfig(
        target_modules=["q_proj"], init_lora_weights=False, base_model_name_or_path="owner/base"
    )
    surgery.inject(found, config)
    found.save_pretrained(tmp_path / "adapter")
    return found


def outputs(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(8)[None]).logits


def test_a_model_is_loaded_by_the_id_of_its_adapter_and_keeps_the_id_of_its_base(
    hub: FakeHub, model: Any, tmp_path: Path
) -> None:
    hub.add("owner/base", files(tmp_path / "base"))
    hub.add("owner/adapter", files(tmp_path / "adapter"))
    found = surgery.load_model("owner/adapter")
    assert torch.equal(outputs(found), outputs(model))
    found.save_pretrained(tmp_path / "again")
    config = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "owner/base"
    assert surgery.load_model("owner/base").name_or_path == "owner/base"


def test_an_adapter_in_a_folder_of_a_repository_is_fetched_alone_and_served_from_the_cache(
    hub: FakeHub, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = {f"adapters/one/{name}": data for name, data in files(tmp_path / "adapter").items()}
    hub.add("owner/base", files(tmp_path / "base"))
    hub.add("owner/many", {**inner, "adapters/two/adapter_model.safetensors": b"other", "README.md": b"text"})
    found = surgery.load_model("owner/many", subfolder="adapters/one")
    assert torch.equal(outputs(found), outputs(model))
    fetched = {path.name for path in located("owner/many", subfolder="adapters/one").path.parents[1].rglob("*.*")}
    assert fetched == {"adapter_config.json", "adapter_model.safetensors"}
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert surgery.LoraConfig.from_pretrained("owner/many", subfolder="adapters/one").target_modules
    with pytest.raises(surgery.EnvironmentFault):
        surgery.LoraConfig.from_pretrained("owner/many", subfolder="adapters/two")


PUSHES = {
    "push_to_hub": lambda model, _: model.push_to_hub("me/pushed", private=True),
    "save_pretrained": lambda model, folder: model.save_pretrained(
        folder / "out", push_to_hub=True, repo_id="me/pushed", private=True
    ),
}


@pytest.mark.parametrize("push", PUSHES)
def test_a_model_pushes_its_adapter_alone(push: str, hub: FakeHub, model: Any, tmp_path: Path) -> None:
    hub.add("owner/base", files(tmp_path / "base"))
    PUSHES[push](model, tmp_path)
    repository = hub.repositories["me/pushed"]
    assert repository.private
    there = repository.commits[repository.branches["main"]].keys()
    assert there - {"README.md"} == {"adapter_config.json", "adapter_model.safetensors", "surgery.base.json"}
    assert torch.equal(outputs(surgery.load_model("me/pushed")), outputs(model))


def test_trainer_pushes_the_adapter_alone(hub: FakeHub, model: Any, tmp_path: Path) -> None:
    rows = [{"input_ids": row, "labels": row} for row in torch.arange(24).reshape(4, 6)]
    quiet = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no"}
    arguments = TrainingArguments(str(tmp_path / "run"), hub_model_id="me/run", push_to_hub=True, max_steps=1, **quiet)
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    trainer.push_to_hub()
    repository = hub.repositories["me/run"]
    there = repository.commits[repository.branches["main"]].keys()
    assert {name for name in there if name.endswith(".safetensors")} == {"adapter_model.safetensors"}
    assert "config.json" not in there


@pytest.mark.usefixtures("model")
def test_a_folder_that_the_repository_lacks_is_refused(hub: FakeHub, tmp_path: Path) -> None:
    hub.add("owner/adapter", files(tmp_path / "adapter"))
    with pytest.raises(surgery.InputError):
        surgery.load_model("owner/adapter", subfolder="none")
    with pytest.raises(surgery.UsageError, match="one is wanted"):
        surgery.load_model("owner/adapter@one", revision="two")


def test_codes_are_kept_of_the_commit_that_the_model_was_loaded_from(hub: FakeHub, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    wide = SIZES | {"hidden_size": 128, "intermediate_size": 256}
    LlamaForCausalLM(LlamaConfig(**wide)).bfloat16().save_pretrained(tmp_path / "base")
    config = surgery.LoraConfig(r=1, target_modules=["q_proj"])  # as it begins, B is zero
    surgery.save(surgery.inject(LlamaForCausalLM.from_pretrained(tmp_path / "base"), config), tmp_path / "none")
    surgery.merge_checkpoint(tmp_path / "base", tmp_path / "none", tmp_path / "held", into="w4a16", min_retained=0.0)
    hub.add("owner/held", files(tmp_path / "held"))
    decoded = transformers.CompressedTensorsConfig(dequantize=True)
    model = surgery.load_model("owner/held", quantization=decoded)
    hub.add("owner/held", files(tmp_path / "base"))
    surgery.inject(model, config, quantization_aware="keep")
    with pytest.raises(surgery.MatchError, match="is held in codes"):
        surgery.inject(surgery.load_model("owner/held"), config, quantization_aware="keep")
