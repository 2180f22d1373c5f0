"""HiRA to peft and from it: outputs, gradients, files and merges, over every layer that peft adapts."""

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from both_ways import close, command_line_merges_and_takes_back, files_go_both_ways, gradients_agree
from pairs import each_merge, judge_merge_of_peft, merge_live_and_on_files, saved, trainable, trained
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import surgery

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 99, "bos_token_id": 0, "eos_token_id": 0}
CASES: dict[str, dict[str, Any]] = {
    "llama": {"target_modules": ["q_proj", "down_proj"], "hira_dropout": 0.1},
    "embedding": {"target_modules": ["embed_tokens", "v_proj"], "init_weights": False},
    "gpt2": {"target_modules": ["c_attn", "mlp.c_proj"], "fan_in_fan_out": True, "init_weights": "gaussian"},
    "places": {"target_modules": ["0", "2", "4"]},
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FILE = "model.safetensors"
each_case = pytest.mark.parametrize("case", CASES)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
of_transformers = pytest.mark.parametrize("case", ["llama", "embedding", "gpt2"])


class Places(nn.Sequential):
    """A convolution over one axis, over two and over three."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv1d(4, 6, 3, padding=1), nn.Unflatten(2, (4, 4)),
            nn.Conv2d(6, 8, (3, 2), stride=(1, 2), dilation=1), nn.Unflatten(3, (1, 2)), nn.Conv3d(8, 5, (2, 1, 2)),
        )  # fmt: skip


def made(case: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    if case == "places":
        return Places().to(dtype).eval()
    model = GPT2LMHeadModel(GPT2Config(**GPT2)) if case == "gpt2" else LlamaForCausalLM(LlamaConfig(**SMALL))
    with torch.no_grad():
        for values in model.parameters():
            if values.dim() > 1:  # of a size at which what is multiplied with it shows
                values.mul_(4)
    return model.to(dtype).eval()


def given(case: str) -> Tensor:
    return torch.linspace(-1, 1, 2 * 4 * 16).reshape(2, 4, 16) if case == "places" else torch.arange(12)[None]


def outputs(case: str, grad: bool = False) -> Any:
    def run(model: nn.Module) -> Tensor:
        with torch.set_grad_enabled(grad):
            out = model(given(case))
        return out if isinstance(out, Tensor) else out[0]

    return run


def config(case: str) -> peft.HiraConfig:
    return peft.HiraConfig(r=4, **copy.deepcopy(CASES[case]))


def by_peft(model: nn.Module, case: str) -> peft.PeftModel:
    return trained(peft.get_peft_model(copy.deepcopy(model), config(case)), 1 / 4)


@each_case
def test_files_go_both_ways_with_equal_outputs_and_gradients(case: str, tmp_path: Path) -> None:
    model = made(case)
    theirs = by_peft(model, case)
    files_go_both_ways(model, theirs, outputs(case), tmp_path)
    ours = surgery.load(copy.deepcopy(model), tmp_path / "theirs", trainable=True)
    gradients_agree(theirs, ours, outputs(case, grad=True))


@each_case
def test_a_config_hits_the_same_modules_with_the_same_shapes_as_in_peft(case: str) -> None:
    wanted = trainable(peft.get_peft_model(made(case), config(case)))
    assert trainable(surgery.inject(made(case), config(case))) == wanted


def test_ranks_by_module_are_heeded_and_peft_does_so_in_a_second_adapter_alone(tmp_path: Path) -> None:
    fields = CASES["llama"] | {"r": 4, "rank_pattern": {"q_proj": 3}}
    model, name = made("llama"), "model.layers.1.self_attn.q_proj.hira_A"
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.HiraConfig(**fields))
    theirs.add_adapter("second", peft.HiraConfig(**fields))
    theirs.save_pretrained(tmp_path)
    ranks = {key: len(values) for key, values in theirs.state_dict().items() if name in key}
    assert ranks == {f"base_model.model.{name}.default": 4, f"base_model.model.{name}.second": 3}
    for folder, rank in ((tmp_path, 4), (tmp_path / "second", 3)):
        ours = surgery.load(copy.deepcopy(model), folder)
        assert len(ours.get_parameter(f"{name}.default")) == rank
        surgery.save(ours, tmp_path / str(rank))
        again = surgery.load(copy.deepcopy(model), tmp_path / str(rank))
        assert len(again.get_parameter(f"{name}.default")) == rank
    assert len(surgery.inject(model, surgery.HiraConfig(**fields)).get_parameter(f"{name}.default")) == 3


def test_every_field_that_peft_writes_is_read_and_written_again(tmp_path: Path) -> None:
    peft.HiraConfig().save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert surgery.HiraConfig().to_json() == written
    assert surgery.HiraConfig.from_json(written) == surgery.HiraConfig()


@each_merge(["llama", "embedding", "gpt2"], DTYPES)
def test_a_merge_by_peft_passes_verify_and_one_that_forgot_a_tensor_does_not(
    case: str, dtype: torch.dtype, safe: bool, tmp_path: Path
) -> None:
    model = made(case, dtype)
    judge_merge_of_peft(model, by_peft(model, case), tmp_path, safe)


@each_dtype
def test_two_that_peft_merges_together_pass_verify_in_either_order_and_one_alone_does_not(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    model = made("llama", dtype)
    model.save_pretrained(tmp_path / "base")
    theirs = peft.get_peft_model(copy.deepcopy(model), config("llama")).eval()
    theirs.add_adapter("other", config("llama"))
    theirs.eval()
    with torch.no_grad():
        for name, values in theirs.named_parameters():
            if "hira_" in name:
                values.add_(torch.randn_like(values) / 4)
    theirs.save_pretrained(tmp_path)
    both = [tmp_path, tmp_path / "other"]
    ours = surgery.load(copy.deepcopy(model), both[0], adapter_name="default")
    surgery.load(ours, both[1], adapter_name="other")
    surgery.set_adapter(ours, ["default", "other"])
    theirs.base_model.set_adapter(["default", "other"])
    assert close(outputs("llama")(ours), outputs("llama")(theirs))
    theirs.merge_and_unload(adapter_names=["default", "other"]).save_pretrained(tmp_path / "out")
    for order in (both, both[::-1]):
        surgery.verify_checkpoint(tmp_path / "base", order, tmp_path / "out").require()
    assert not surgery.verify_checkpoint(tmp_path / "base", both[:1], tmp_path / "out").ok
    assert not surgery.verify_checkpoint(tmp_path / "base", [both[0], (both[1], 0.5)], tmp_path / "out").ok


@pytest.mark.parametrize("case", ["llama", "gpt2", "places"])
def test_live_and_streaming_merges_are_one_and_the_command_line_takes_it_back(case: str, tmp_path: Path) -> None:
    model = made(case)
    by_peft(model, case).save_pretrained(tmp_path / "adapter")
    ours = surgery.load(copy.deepcopy(model), tmp_path / "adapter")
    changed = merge_live_and_on_files(saved(model, tmp_path / "base"), tmp_path / "adapter", ours, tmp_path)
    assert len(changed) == len(load_file(tmp_path / "adapter" / "adapter_model.safetensors")) // 2
    if case == "llama":
        model.save_pretrained(tmp_path / "whole")
        command_line_merges_and_takes_back(tmp_path / "whole", tmp_path / "adapter", tmp_path)


def test_where_a_weight_is_taken_away_a_plain_merge_is_judged_by_what_it_rounds(tmp_path: Path) -> None:
    """W + W * -1 leaves what the product rounds, which is nothing next to W and much next to what is left."""
    for dtype in DTYPES:
        folder = tmp_path / str(dtype)
        folder.mkdir()
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 64)).to(dtype)
        surgery.inject(model, surgery.HiraConfig(r=1, target_modules=["0"]))
        p = model[0].fitted["default"].params
        with torch.no_grad():
            p["A"].copy_(torch.rand(1, 64) + 0.5)
            p["B"].copy_(-1 / p["A"].mT)
        surgery.save(model, folder / "adapter")
        base = saved(nn.Sequential(model[0].base_layer), folder / "base")
        W, out = model[0].base_layer.weight.detach(), load_file(base / FILE)
        plain = W + W * (p["B"] @ p["A"]).to(dtype).detach()
        (folder / "out").mkdir()
        save_file(out | {"0.weight": plain}, folder / "out" / FILE)
        surgery.verify_checkpoint(base, folder / "adapter", folder / "out").require()
        save_file(out | {"0.weight": plain + 4 * torch.finfo(dtype).eps * W}, folder / "out" / FILE)
        assert not surgery.verify_checkpoint(base, folder / "adapter", folder / "out").ok
