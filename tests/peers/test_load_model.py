"""load_model finds the base and its class from an adapter alone, and runs no code of a repository."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    PreTrainedModel,
)

import surgery

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99}
TOKENS = torch.arange(24).reshape(2, 12)
CONFIG = {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": False}


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS)[0]


def base(folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SMALL, **options)).to(dtype).save_pretrained(folder)
    return folder


def trained(model: PreTrainedModel, folder: Path, config: dict[str, Any], **told: Any) -> PreTrainedModel:
    """The model under an adapter that lies in `folder`, whose config says `told` too."""
    surgery.inject(model, surgery.LoraConfig(**config))
    model.save_pretrained(folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | told))
    return model


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, PreTrainedModel]:
    """The folder of an adapter that names its base, and the model under it."""
    model = LlamaForCausalLM.from_pretrained(base(tmp_path / "base"))
    return tmp_path / "adapter", trained(model, tmp_path / "adapter", CONFIG)


def test_an_adapter_brings_its_base_and_the_model_is_frozen(pair: tuple[Path, PreTrainedModel]) -> None:
    folder, model = pair
    found = surgery.load_model(folder)
    assert isinstance(found, LlamaForCausalLM)
    assert torch.equal(outputs(found), outputs(model))
    assert found.active_adapters() == ["default"]
    assert not any(values.requires_grad for values in found.parameters())


def test_a_trainable_adapter_is_trained_and_nothing_else(pair: tuple[Path, PreTrainedModel]) -> None:
    found = surgery.load_model(pair[0], trainable=True)
    names = {name for name, values in found.named_parameters() if values.requires_grad}
    assert names == {name for name in found.state_dict() if ".default." in name}


def test_an_adapter_lies_in_a_sub_folder(pair: tuple[Path, PreTrainedModel]) -> None:
    folder, model = pair
    found = surgery.load_model(folder.parent, subfolder="adapter")
    assert torch.equal(outputs(found), outputs(model))


def test_a_base_beside_the_adapter_goes_before_the_one_that_is_named(pair: tuple[Path, PreTrainedModel]) -> None:
    folder, model = pair
    for path in (folder.parent / "base").iterdir():
        path.rename(folder / path.name)
    assert torch.equal(outputs(surgery.load_model(folder)), outputs(model))


def test_a_plain_model_is_loaded_in_its_own_class(tmp_path: Path) -> None:
    assert type(surgery.load_model(base(tmp_path / "base"))) is LlamaForCausalLM


@pytest.mark.parametrize(("dtype", "wanted"), [("auto", torch.bfloat16), (torch.float32, torch.float32)], ids=str)
def test_the_dtype_is_that_of_the_base_or_the_one_given(dtype: Any, wanted: torch.dtype, tmp_path: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(base(tmp_path / "base", torch.bfloat16))
    trained(model, tmp_path / "adapter", CONFIG)
    (tmp_path / "adapter" / "surgery.base.json").unlink()
    assert surgery.load_model(tmp_path / "adapter", dtype=dtype).lm_head.weight.dtype == wanted


def test_a_device_map_places_the_model(pair: tuple[Path, PreTrainedModel]) -> None:
    folder, model = pair
    found = surgery.load_model(folder, device_map="cpu")
    assert torch.equal(outputs(found), outputs(model))


BERT = {"r": 4, "target_modules": ["query"], "init_lora_weights": False}


@pytest.mark.parametrize(
    ("told", "wanted"),
    [
        ({"task_type": "FEATURE_EXTRACTION"}, BertModel),
        ({"auto_mapping": {"base_model_class": "BertModel", "parent_library": "os"}}, BertModel),
        ({"auto_mapping": {"base_model_class": "BertForMaskedLM", "parent_library": None}}, BertForMaskedLM),
        ({}, BertForMaskedLM),
        ({"auto_mapping": None, "task_type": None}, BertForMaskedLM),
    ],
    ids=str,
)
def test_the_class_is_that_of_the_task_or_the_one_named(told: dict[str, Any], wanted: type, tmp_path: Path) -> None:
    torch.manual_seed(0)
    BertForMaskedLM(BertConfig(**SMALL)).save_pretrained(tmp_path / "base")
    inner = wanted.from_pretrained(tmp_path / "base")
    trained(inner, tmp_path / "adapter", BERT, **told)
    found = surgery.load_model(tmp_path / "adapter")
    assert type(surgery.eject(found)) is wanted


def test_a_class_that_is_given_goes_first(pair: tuple[Path, PreTrainedModel]) -> None:
    folder, model = pair
    found = surgery.load_model(folder, model_class=AutoModelForCausalLM)
    assert torch.equal(outputs(found), outputs(model))
    bare = surgery.load_model(folder, model_class=LlamaModel)
    assert isinstance(bare, LlamaModel)


def test_a_classifier_has_as_many_labels_as_the_adapter_brings(tmp_path: Path) -> None:
    torch.manual_seed(0)
    BertModel(BertConfig(**SMALL)).save_pretrained(tmp_path / "base")
    model = BertForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=5)
    trained(model, tmp_path / "adapter", BERT | {"task_type": "SEQ_CLS"})
    found = surgery.load_model(tmp_path / "adapter")
    assert outputs(found).shape == (2, 5)
    assert torch.equal(outputs(found), outputs(model))


@pytest.mark.parametrize("name", ["pipeline", "os", "models", "__class__", "AutoModel", "NoSuchModel", "a.b", 3])
def test_a_name_that_is_no_model_of_transformers_is_refused(name: Any, pair: tuple[Path, PreTrainedModel]) -> None:
    path = pair[0] / "adapter_config.json"
    mapping = {"auto_mapping": {"base_model_class": name, "parent_library": "os"}}
    path.write_text(json.dumps(json.loads(path.read_text()) | mapping))
    with pytest.raises(surgery.InputError, match="no model of transformers"):
        surgery.load_model(pair[0])


@pytest.mark.parametrize("model_class", [None, AutoModelForCausalLM])
def test_code_of_a_repository_is_not_run(model_class: Any, pair: tuple[Path, PreTrainedModel]) -> None:
    folder = pair[0].parent / "base"
    canary = folder.parent / "canary"
    (folder / "evil.py").write_text(f"open({str(canary)!r}, 'w')\nclass Evil: pass\nclass EvilConfig: pass\n")
    config = json.loads((folder / "config.json").read_text())
    mapping = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.Evil", "AutoModel": "evil.Evil"}
    remote = config | {"auto_map": mapping, "model_type": "evil", "architectures": ["Evil"]}
    (folder / "config.json").write_text(json.dumps(remote))
    with pytest.raises((surgery.InputError, ValueError)):
        surgery.load_model(pair[0], model_class=model_class)
    assert not canary.exists()


def test_code_that_a_known_model_brings_is_not_run_either(pair: tuple[Path, PreTrainedModel]) -> None:
    folder, model = pair
    canary, path = folder.parent / "canary", folder.parent / "base" / "config.json"
    (path.parent / "evil.py").write_text(f"open({str(canary)!r}, 'w')\nclass Evil: pass\n")
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"auto_map": {"AutoModelForCausalLM": "evil.Evil"}}))
    found = surgery.load_model(folder, model_class=AutoModelForCausalLM)
    assert torch.equal(outputs(found), outputs(model))
    assert not canary.exists()


def test_an_adapter_without_a_base_or_with_one_that_is_not_there_is_refused(pair: tuple[Path, PreTrainedModel]) -> None:
    path = pair[0] / "adapter_config.json"
    config = json.loads(path.read_text())
    for told, wanted in ((None, "base_model_name_or_path is empty"), ("./none/there", "its base: ")):
        path.write_text(json.dumps(config | {"base_model_name_or_path": told}))
        with pytest.raises(surgery.InputError, match=wanted):
            surgery.load_model(pair[0])


def test_a_folder_that_holds_neither_is_refused(tmp_path: Path) -> None:
    with pytest.raises(surgery.InputError, match="a model or an adapter folder is wanted"):
        surgery.load_model(tmp_path)


def test_a_base_that_lacks_what_is_adapted_is_refused(pair: tuple[Path, PreTrainedModel]) -> None:
    from safetensors.torch import load_file, save_file

    path = pair[0].parent / "base" / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.self_attn.q_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(surgery.MatchError, match="for a LlamaForCausalLM, which the adapter"):
        surgery.load_model(pair[0])


CONFIGS = [name for name in surgery.__all__ if name.endswith("Config") and name != "AdapterConfig"]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_goes_to_a_folder_and_back(name: str, tmp_path: Path) -> None:
    kind = getattr(surgery, name)
    settings = {"total_step": 10, "tinit": 1, "tfinal": 1} if name == "AdaLoraConfig" else {}
    config = kind(target_modules=["q_proj"], task_type="CAUSAL_LM", base_model_name_or_path="owner/base", **settings)
    config.save_pretrained(tmp_path / "new" / "folder")
    found = kind.from_pretrained(tmp_path / "new", subfolder="folder")
    assert found == config
    assert surgery.AdapterConfig.from_pretrained(tmp_path / "new" / "folder") == config
    peft = pytest.importorskip("peft")
    theirs = peft.PeftConfig.from_pretrained(str(tmp_path / "new" / "folder"))
    assert {*theirs.target_modules} == {"q_proj"}


def test_a_config_of_another_kind_or_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(surgery.InputError):
        surgery.LoraConfig.from_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "NONE"}')
    with pytest.raises(surgery.FormatError, match="peft_type"):
        surgery.LoraConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["AdaLoraConfig", "LoraConfig"])
def test_a_config_reads_files_whatever_was_imported_before(name: str, tmp_path: Path) -> None:
    import subprocess
    import sys

    code = f"import surgery; surgery.{name}(target_modules=['x']).save_pretrained({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert (tmp_path / "adapter_config.json").is_file()
