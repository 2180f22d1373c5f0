"""Exports of transformers' models, in memory and from files, of every architecture in the table."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import transformers
from architectures import ARCHITECTURES
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

import surgery
from surgery.cli import main
from surgery.formats.onnx.runtime import decode
from surgery.integrations.transformers import export_files, exporting
from surgery.integrations.transformers.exporting import _one_of
from surgery.procedures.exports import tokens

DECODERS = ("llama", "qwen3", "mistral", "gemma3", "phi3", "opt", "gpt2", "gpt-neox", "bloom", "mixtral", "qwen3-moe")
QUICK = ("vit", "mixtral")  # one that is renamed in files, and one whose experts are fused


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base in shards of bfloat16, with a tied head, and an adapter; both with a tokenizer."""
    return made(tmp_path_factory.mktemp("llama"), 1)  # to trace another layer takes half as long again


@pytest.fixture(scope="module")
def of_two_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("llama of two"), 2)


def made(root: Path, layers: int) -> Path:
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(small_llama(layers))
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.to(torch.bfloat16).save_pretrained(root / "base", max_shard_size="40KB")
    modules = ["q_proj", "down_proj"]
    surgery.inject(model, surgery.LoraConfig(r=4, target_modules=modules, init_lora_weights=False))
    surgery.save(model, root / "adapter")
    for name in ("base", "adapter"):
        (root / name / "tokenizer.json").write_text(json.dumps({"of": name}))
    (root / "base" / "special_tokens_map.json").write_text("{}")
    return root


def small_llama(layers: int) -> transformers.LlamaConfig:
    config = ARCHITECTURES["llama"]().config
    config.num_hidden_layers = layers
    return config


def run(*words: object) -> Any:
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    return ended.value.code or 0


def test_a_checkpoint_is_merged_and_exported_in_one_go(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run("export", folders / "base", folders / "adapter", out, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    merged = surgery.merge_checkpoint(folders / "base", folders / "adapter", tmp_path / "merged").receipt
    receipt = json.loads((out / "surgery.receipt.json").read_text())
    assert receipt["files"] == merged["files"]
    assert set(told["weights"]) == set(merged["files"])
    assert len(told["proof"]["trials"]) == 3
    assert all(one["merged"]["ok"] and one["adapted"]["ok"] for one in told["proof"]["trials"])
    assert all(one["adapted"]["outputs"]["logits"]["effect"] > 0.1 for one in told["proof"]["trials"])
    graph = onnx.load(out / "model.onnx", load_external_data=False).graph
    linked = {one.name for one in graph.initializer if one.external_data}
    assert linked == {f"weights/{name}" for name in {**receipt["changed"], **receipt["untouched"]}}
    shape = [axis.dim_param or axis.dim_value for axis in graph.output[0].type.tensor_type.shape.dim]
    assert ([one.name for one in graph.input], shape) == (
        ["input_ids", "attention_mask"],
        ["batch", "sequence", 100],
    )
    assert run("verify", out) == 0
    assert run("verify", folders / "base", folders / "adapter", out) == 0
    transformers.AutoModelForCausalLM.from_pretrained(out)
    carries_the_tokenizer(out)
    assert (out / "model.safetensors.index.json").exists()
    (out / "model.onnx").write_bytes((out / "model.onnx").read_bytes() + b"\x72\x00")  # an empty producer_name more
    assert run("verify", out) == 4


@pytest.mark.parametrize("way", [{}, {"swappable": True}], ids=["merged", "swappable"])
def test_an_adapter_of_another_base_is_refused_as_merge_does(
    way: dict[str, Any], folders: Path, tmp_path: Path
) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(folders / "base", dtype="auto")
    surgery.inject(model, surgery.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    surgery.save(model, tmp_path / "adapter")
    with torch.no_grad():
        for layer in surgery.eject(model).model.layers:
            layer.self_attn.q_proj.weight.neg_()
    model.save_pretrained(tmp_path / "other")
    told = r"trained on another base: .*q_proj.weight had sha256 \w+ there, and here \w+"
    with pytest.raises(surgery.InputError, match=told):
        surgery.merge_checkpoint(tmp_path / "other", tmp_path / "adapter", tmp_path / "out")
    with pytest.raises(surgery.InputError, match=told):
        surgery.export_onnx(tmp_path / "other", tmp_path / "adapter", tmp_path / "out", **way)
    assert not (tmp_path / "out").exists()


def test_adapters_at_a_weight_are_compared_with_the_live_model_too_and_no_bars_are_drawn(
    folders: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The settings of transformers stay as they are."""
    logging = transformers.utils.logging
    was = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.enable_progress_bar()
    try:
        proof = surgery.export_onnx(folders / "base", (folders / "adapter", 0.5), tmp_path / "out").proof
        assert logging.is_progress_bar_enabled()
    finally:
        if not was[1]:
            logging.disable_progress_bar()
    assert logging.get_verbosity() == was[0]
    assert capfd.readouterr().err == ""
    assert all(one.adapted is not None and one.adapted.ok for one in proof.trials)
    assert not proof.left_out


def test_a_model_that_transformers_does_not_know_is_refused_before_anything_is_merged(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(folders / "base", tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps(config | {"model_type": "unheard-of"}))
    monkeypatch.setattr(export_files, "merge_checkpoint", None)
    with pytest.raises(surgery.FormatError, match=r"config\.json: transformers makes no config of it: .*unheard-of"):
        surgery.export_onnx(tmp_path / "base", None, tmp_path / "out")


def rewritten(base: Path, out: Path, tensors: Callable[[dict[str, Tensor]], Any], **config: Any) -> Path:
    """The base with other tensors, in one file, and another config."""
    out.mkdir()
    held = {name: one for file in base.glob("*.safetensors") for name, one in load_file(file).items()}
    tensors(held)
    save_file(held, out / "model.safetensors", {"format": "pt"})
    told = json.loads((base / "config.json").read_text()) | config
    (out / "config.json").write_text(json.dumps(told))
    return out


def without_layer(held: dict[str, Tensor]) -> None:
    for name in [name for name in held if name.startswith("model.layers.1.")]:
        del held[name]


def without_prefix(held: dict[str, Tensor]) -> None:
    for name in list(held):
        held[name.removeprefix("model.")] = held.pop(name)


def with_bias(held: dict[str, Tensor]) -> None:
    held["model.layers.0.self_attn.q_proj.bias"] = torch.ones(len(held["model.layers.0.self_attn.q_proj.weight"]))


NOT_WHOLE: dict[str, tuple[Callable[[dict[str, Tensor]], Any], int, str]] = {
    "fewer layers in the config": (len, 1, r"place for model\.layers\.1\.[\w.]+, .* and 6 more; a config"),
    "the same of files without a head": (without_prefix, 1, r"place for layers\.1\.[\w.]+, .* and 6 more; a config"),
    "a bias that the config leaves out": (
        with_bias,
        2,
        r"place for model\.layers\.0\.self_attn\.q_proj\.bias; a config",
    ),
    "fewer layers in the files": (without_layer, 2, r"model\.layers\.1\.[\w.]+[:,] "),
}


@pytest.mark.parametrize("way", [{}, {"swappable": True}], ids=["merged", "swappable"])
@pytest.mark.parametrize(("tensors", "layers", "told"), NOT_WHOLE.values(), ids=NOT_WHOLE.keys())
def test_config_and_files_that_do_not_tell_of_the_same_tensors_are_refused(
    tensors: Callable[[dict[str, Tensor]], Any],
    layers: int,
    told: str,
    way: dict[str, Any],
    of_two_layers: Path,
    tmp_path: Path,
) -> None:
    base = rewritten(of_two_layers / "base", tmp_path / "base", tensors, num_hidden_layers=layers)
    adapter = surgery.LoraConfig(r=2, target_modules=["layers.0.self_attn.q_proj"], init_lora_weights=False)
    model = surgery.inject(ARCHITECTURES["llama"](), adapter)
    surgery.save(model, tmp_path / "adapter")
    with pytest.raises(surgery.InputError, match=told):
        surgery.export_onnx(base, [tmp_path / "adapter"] if way else None, tmp_path / "out", **way)
    assert not (tmp_path / "out").exists()


def test_the_head_of_another_task_stays_in_the_files_and_is_told_of(folders: Path, tmp_path: Path) -> None:
    """And so do masks that were once stored, which the class says to ignore, and which are not told of."""

    def with_head(held: dict[str, Tensor]) -> None:
        held["score.weight"] = torch.ones(2, 64)
        held["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

    base = rewritten(folders / "base", tmp_path / "base", with_head)
    report = surgery.export_onnx(base, None, tmp_path / "out")
    assert report.unread == ["score.weight"]
    assert report.summary().endswith("; 1 tensors are of no part of the model")
    assert "score.weight" in load_file(tmp_path / "out" / "model.safetensors")


def test_swappable_adapters_come_with_the_tokenizer_as_merged_ones_do(folders: Path, tmp_path: Path) -> None:
    """What the adapter brings wins; an index of other files of weights is not carried."""
    surgery.export_onnx(folders / "base", folders / "adapter", tmp_path / "out", swappable=True)
    carries_the_tokenizer(tmp_path / "out")
    assert not (tmp_path / "out" / "model.safetensors.index.json").exists()
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def carries_the_tokenizer(out: Path) -> None:
    """The adapter's, and what the base has beside it."""
    assert json.loads((out / "tokenizer.json").read_text()) == {"of": "adapter"}
    assert (out / "special_tokens_map.json").read_text() == "{}"


def test_fused_experts_are_made_one_by_one_and_not_compared_where_they_do_not_fit_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[StorageWeakRef] = []

    def watched(*given: Any) -> torch.Tensor:
        assert all(one.expired() for one in made)
        values = _one_of(*given)
        made.append(StorageWeakRef(values.untyped_storage()))
        return values

    monkeypatch.setattr(exporting, "_one_of", watched)
    ARCHITECTURES["mixtral"]().save_pretrained(tmp_path / "base")
    report = surgery.export_onnx(tmp_path / "base", None, tmp_path / "out", max_memory="1KB")
    assert len(made) == 4  # two stacks in each of two layers
    assert "not run against the model" in report.summary()
    assert report.proof.trials == ()


def test_a_model_that_runs_for_one_length_alone_is_refused(tmp_path: Path) -> None:
    sizes = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 1, "state_size": 4}
    model = transformers.MambaForCausalLM(transformers.MambaConfig(**sizes))
    with pytest.raises(surgery.InputError, match=r"^MambaForCausalLM: .*the traced size alone, 6 along sequence"):
        surgery.export_onnx(model, None, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_export_of_files_asks_for_no_inputs(folders: Path, tmp_path: Path) -> None:
    with pytest.raises(surgery.UsageError, match="inputs are made of the config"):
        surgery.export_onnx(folders / "base", None, tmp_path / "out", inputs=torch.ones(1, 2))
    alone = shutil.copy(next((folders / "base").glob("*.safetensors")), tmp_path)
    with pytest.raises(surgery.AbsentError, match=r"no config\.json"):
        surgery.export_onnx(alone, None, tmp_path / "out")
    with pytest.raises(surgery.InputError, match="it is an adapter"):
        surgery.export_onnx(folders / "adapter", None, tmp_path / "out")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in ARCHITECTURES]
)
def test_onnxruntime_computes_what_each_architecture_does(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    ARCHITECTURES[name]().save_pretrained(tmp_path / "base")
    report = surgery.export_onnx(tmp_path / "base", None, tmp_path / "out")
    assert report.proof.ok
    assert len(report.proof.trials) == 3
    graph = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False).graph
    inside = sum(len(one.raw_data) for one in graph.initializer if not one.external_data)
    assert inside < 0.1 * sum(report.weights.values())


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "gemma3" else [pytest.mark.slow]) for name in DECODERS]
)
def test_one_graph_takes_a_prompt_and_then_single_tokens(name: str, tmp_path: Path) -> None:
    """gemma3's past is longer than its window in one of the trials, and while it decodes."""
    torch.manual_seed(0)
    model = ARCHITECTURES[name]().eval()
    report = surgery.export_onnx(model, None, tmp_path / "out", kv=True)
    assert [dict(one.shapes)["past_key_values.0.key"][2] for one in report.proof.trials] == [0, 5, 9]
    prompt = torch.tensor([[5, 6, 7, 8, 9]])
    ours = decode(tmp_path / "out" / "model.onnx", prompt, 12)
    theirs = model.generate(prompt, max_new_tokens=12, min_new_tokens=12, do_sample=False)[0, 5:]
    assert ours.tolist() == theirs.tolist()


def test_tokens_that_differ_end_the_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ARCHITECTURES["gpt2"]().eval()
    monkeypatch.setattr(tokens, "decode", lambda *_: torch.full([12], 3))
    with pytest.raises(surgery.CheckError, match=r"token 0 of 12 that onnxruntime decodes is 3, the model's is \d+"):
        surgery.export_onnx(model, None, tmp_path / "out", kv=True)
    assert list(tmp_path.iterdir()) == []


def test_a_model_without_a_cache_of_keys_and_values_is_refused(tmp_path: Path) -> None:
    with pytest.raises(surgery.InputError, match="BertForSequenceClassification: no decoder of text"):
        surgery.export_onnx(ARCHITECTURES["bert"](), None, tmp_path / "out", kv=True)


@pytest.mark.slow
@pytest.mark.parametrize("names", ["hf", "genai"])
def test_swappable_adapters_of_a_decoder_with_its_cache(names: str, folders: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["--adapters", "swappable", "--names", names, "--kv"]
    assert run("export", folders / "base", folders / "adapter", out, *arguments) == 0
    assert (out / "adapter.onnx_adapter").is_file()
    inputs = {one.name for one in onnx.load(out / "model.onnx", load_external_data=False).graph.input}
    wanted = {
        "hf": "model.layers.0.self_attn.q_proj.lora_A.weight",
        "genai": "model.layers.0.attn.q_proj.lora_A.MatMul.weight",
    }
    assert wanted[names] in inputs


@pytest.mark.slow
def test_adapters_of_experts_are_exported_merged(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = ARCHITECTURES["mixtral"]().eval()
    experts = ["mlp.experts.gate_up_proj"]
    config = surgery.LoraConfig(r=2, target_modules=["q_proj"], target_parameters=experts, init_lora_weights=False)
    surgery.inject(model, config)
    report = surgery.export_onnx(model, None, tmp_path / "out")
    assert all(one.adapted is not None and one.adapted.ok for one in report.proof.trials)
    with pytest.raises(surgery.MatchError, match="its op is experts; slots lie over linear layers"):
        surgery.export_onnx(model, None, tmp_path / "slots", swappable=True)
