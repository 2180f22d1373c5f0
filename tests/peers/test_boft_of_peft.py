"""BOFT to peft and from it: outputs, gradients, files and merges; and where peft's own are wrong."""

import copy
import json
import time
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from pairs import (
    FILE,
    gradients,
    judge_merge_of_peft,
    merge_live_and_on_files,
    noise,
    outputs,
    saved,
    trainable,
    trained,
    within_noise,
)
from peft.tuners.boft import layer as boft_layers
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import surgery
from surgery.cli import main
from surgery.errors import ConfigError, MatchError
from surgery.layers.adapted import Adapted

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99}
TARGETS: dict[str, Any] = {"target_modules": ["q_proj", "down_proj"]}
CASES: Mapping[str, dict[str, Any]] = {
    "sizes": {},
    "numbers": {"boft_block_size": 0, "boft_block_num": 2},
    "two factors": {"boft_block_size": 4, "boft_n_butterfly_factor": 2},
    "three factors": {"boft_block_size": 0, "boft_block_num": 8, "boft_n_butterfly_factor": 3},
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
each_case = pytest.mark.parametrize("case", CASES)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


class Extension:
    """What peft builds for CUDA: blocks [n, blocks, b, b] along the diagonals of n matrices, and back."""

    @staticmethod
    def forward(blocks: Tensor) -> list[Tensor]:
        return [torch.stack([torch.block_diag(*one) for one in blocks])]

    @staticmethod
    def backward(gradient: Tensor, blocks: Tensor) -> list[Tensor]:
        n, count, b, _ = blocks.shape
        cut = gradient.view(n, count, b, count, b).diagonal(dim1=1, dim2=3)  # [n, b, b, blocks]
        return [cut.movedim(-1, 1)]


@pytest.fixture(autouse=True)
def _with_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    """peft has several factors where it has the extension alone."""
    monkeypatch.setattr(boft_layers, "get_fbd_cuda", lambda: Extension)


def made(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL, attention_bias=True)).to(dtype).eval()


def config(case: str, **fields: Any) -> peft.BOFTConfig:
    return peft.BOFTConfig(**TARGETS | CASES[case] | fields)


def by_peft(model: nn.Module, case: str, **fields: Any) -> peft.PeftModel:
    return trained(peft.get_peft_model(copy.deepcopy(model), config(case, **fields)), 0.4)


@each_dtype
@each_case
def test_what_peft_saves_gives_equal_outputs_here_and_back_again(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = made(dtype)
    before, theirs = outputs(model), by_peft(model, case)
    wanted = outputs(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = surgery.load(copy.deepcopy(model), tmp_path / "theirs")
    floor = noise(model)
    assert within_noise(outputs(ours), wanted, floor)
    assert not within_noise(outputs(ours), before, floor)
    surgery.save(ours, tmp_path / "ours")
    found, told = (load_file(tmp_path / one / "adapter_model.safetensors") for one in ("ours", "theirs"))
    assert found.keys() == told.keys()
    assert all(torch.equal(found[name], told[name]) for name in found)
    again = peft.PeftModel.from_pretrained(model, tmp_path / "ours").eval()
    assert within_noise(outputs(again), wanted, floor)


@each_case
def test_a_config_hits_the_same_modules_with_the_same_shapes_and_changes_nothing(case: str) -> None:
    wanted = trainable(peft.get_peft_model(made(), config(case)))
    ours = surgery.inject(made(), config(case))
    assert trainable(ours) == wanted
    assert torch.equal(outputs(ours), outputs(made()))


@each_case
def test_training_goes_as_in_peft(case: str) -> None:
    """Of three steps; each gradient is off by roundings of sums alone."""
    theirs = peft.get_peft_model(made(), config(case)).train()
    ours = surgery.inject(made(), config(case)).train()
    for _ in range(3):
        found = []
        for model in (theirs, ours):
            optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=1e-3)
            optimizer.zero_grad()
            model(torch.arange(12)[None])[0].square().sum().backward()
            optimizer.step()
            found.append(gradients(model))
        assert found[0].keys() == found[1].keys()
        for name, wanted in found[0].items():
            assert bool(wanted.any())
            assert float((found[1][name] - wanted).norm()) <= 2**-12 * float(wanted.norm())  # float32 has 2^-24
    kept = [[one.detach() for one in model.parameters() if one.requires_grad] for model in (theirs, ours)]
    assert all(torch.allclose(a, b, rtol=2**-10, atol=2**-20) for a, b in zip(*kept, strict=True))


def test_every_field_that_peft_writes_is_read_and_written_again(tmp_path: Path) -> None:
    peft.BOFTConfig().save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert surgery.BOFTConfig().to_json() == written
    assert surgery.BOFTConfig.from_json(written) == surgery.BOFTConfig()


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"boft_block_num": 4}, "boft_block_size is 4 and boft_block_num is 4; just one of them must be 0"),
        ({"boft_block_size": 0}, "boft_block_size is 0 and boft_block_num is 0; just one of them must be 0"),
        ({"boft_n_butterfly_factor": 0}, "boft_n_butterfly_factor is 0"),
        ({"boft_dropout": 1.0}, r"boft_dropout is 1\.0; .* below 1"),
        ({"bias": "oft_only"}, "'none', 'all' or 'boft_only' is wanted"),
        ({"init_weights": False}, "init_weights is False; PEFT's BOFT has no other start"),
    ],
)
def test_a_value_that_cannot_be_is_refused_by_name(fields: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        surgery.BOFTConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"boft_block_size": 5}, "64 numbers make an output, which cannot be cut into blocks of 5;"),
        ({"boft_block_size": 0, "boft_block_num": 3}, "cannot be cut into 3 blocks;"),
        ({"boft_block_size": 1, "boft_n_butterfly_factor": 2}, "blocks of 1, even ones, dealt out 2 times"),
        ({"boft_block_size": 32, "boft_n_butterfly_factor": 3}, "blocks of 32, even ones, dealt out 3 times"),
        ({"boft_block_size": 0, "boft_block_num": 128}, "cannot be cut into 128 blocks"),
    ],
)
def test_blocks_that_do_not_fit_are_refused_where_peft_refuses_them(fields: dict[str, Any], told: str) -> None:
    model = nn.Sequential(nn.Linear(64, 8))
    with pytest.raises(MatchError, match=told):
        surgery.inject(copy.deepcopy(model), surgery.BOFTConfig(target_modules=["0"], **fields))
    with pytest.raises(ValueError, match=r"(?i)must be|invalid"):
        peft.get_peft_model(model, peft.BOFTConfig(target_modules=["0"], **fields))


def test_factors_beyond_any_cut_are_refused_at_once() -> None:
    config, start = surgery.BOFTConfig(target_modules=["0"], boft_n_butterfly_factor=2**31 - 1), time.process_time()
    with pytest.raises(MatchError, match=f"blocks of 4, even ones, dealt out {2**31 - 1} times"):
        surgery.inject(nn.Sequential(nn.Linear(64, 8)), config)
    assert time.process_time() - start < 0.5


def test_of_a_config_with_more_factors_peft_trains_one_without_its_extension(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The tensors are the truth: what is saved here says so."""
    monkeypatch.setattr(boft_layers, "get_fbd_cuda", lambda: None)
    theirs = by_peft(made(), "two factors")
    theirs.save_pretrained(tmp_path / "theirs")
    ours = surgery.load(made(), tmp_path / "theirs")
    assert within_noise(outputs(ours), outputs(theirs), noise(made()))
    surgery.save(ours, tmp_path / "ours")
    told = [json.loads((tmp_path / one / "adapter_config.json").read_text()) for one in ("theirs", "ours")]
    assert [one["boft_n_butterfly_factor"] for one in told] == [2, 1]


@pytest.mark.parametrize("bias", ["all", "boft_only"])
def test_biases_that_peft_trains_are_trained_here_and_come_back(bias: str, tmp_path: Path) -> None:
    theirs = by_peft(made(), "sizes", bias=bias)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = surgery.load(made(), tmp_path / "theirs", trainable=True)
    assert within_noise(outputs(ours), outputs(theirs), noise(made()))
    surgery.save(ours, tmp_path / "ours")
    found, told = (load_file(tmp_path / one / "adapter_model.safetensors") for one in ("ours", "theirs"))
    assert len({name for name in found if name.endswith(".bias")}) == 2 * (1 if bias == "boft_only" else 4)
    assert found.keys() == told.keys()
    assert all(torch.equal(found[name], told[name]) for name in found)


@pytest.mark.parametrize("safe", [False, True], ids=["merge", "safe_merge"])
@each_dtype
@each_case
def test_a_merge_by_peft_passes_verify_and_one_that_forgot_a_tensor_does_not(
    case: str, dtype: torch.dtype, safe: bool, tmp_path: Path
) -> None:
    model = made(dtype)
    judge_merge_of_peft(model, by_peft(model, case), tmp_path, safe)


class Places(nn.Module):
    """Convolutions over square kernels; the last is of more than one tile."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Conv2d(8, 16, 3, padding=1, stride=2), nn.Conv2d(16, 16, 1)
        self.high = nn.Conv2d(16, 9000, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.high(self.narrow(torch.relu(self.wide(x))))


@each_dtype
@each_case
def test_convolutions_are_as_in_peft_and_merge_to_the_same_bits_everywhere(
    case: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """peft's forward equals its own merge over larger kernels too."""
    torch.manual_seed(0)
    model, x = Places().to(dtype).eval(), torch.randn(2, 8, 8, 8).to(dtype)
    fields = CASES[case] | {"target_modules": ["wide", "narrow", "high"]}
    if case == "three factors":
        fields = fields | {"boft_block_size": 2, "boft_block_num": 0}
    theirs = trained(peft.get_peft_model(copy.deepcopy(model), peft.BOFTConfig(**fields)), 0.1)
    theirs.save_pretrained(tmp_path / "adapter")
    ours = surgery.load(copy.deepcopy(model), tmp_path / "adapter")
    with torch.no_grad():
        wanted, floor = theirs(x), (model(x).double() - copy.deepcopy(model).double()(x.double())).abs().max()
        assert float((ours(x) - wanted).abs().max()) <= 8 * float(floor)
        assert float((ours(x) - model(x)).abs().max()) > 8 * float(floor)
        assert torch.equal(ours(x[:1])[0], ours(x[0]))  # without a batch
    changed = merge_live_and_on_files(saved(model, tmp_path / "base"), tmp_path / "adapter", ours, tmp_path)
    assert changed == {f"{name}.weight" for name in fields["target_modules"]}
    with torch.no_grad():
        merged = theirs.merge_and_unload()
        assert float((merged(x) - wanted).abs().max()) <= 8 * float(floor)
    saved(merged, tmp_path / "by peft")
    report = surgery.verify_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "by peft")
    report.require()
    assert {name for name, one in report.tensors.items() if one.grade != "untouched"} == changed


def test_a_convolution_keeps_its_dilation_which_peft_forgets() -> None:
    """A defect of peft: its forward knows the first stride and padding alone, and no dilation."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(4, 6, 3, dilation=2)).double(), torch.randn(1, 4, 9, 9).double()
    fields = {"target_modules": ["0"], "boft_block_size": 4}
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.BOFTConfig(**fields))
    ours = surgery.inject(copy.deepcopy(model), surgery.BOFTConfig(**fields))
    with torch.no_grad():
        assert theirs(x).shape != model(x).shape
        assert torch.equal(ours(x), model(x))


def test_over_a_convolution_with_another_adapter_it_rotates_what_that_makes_of_the_weight() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(4, 6, 3)).double(), torch.randn(2, 4, 9, 9).double()
    for name, kind in {"a": surgery.BOFTConfig, "b": surgery.LoraConfig, "c": surgery.BOFTConfig}.items():
        surgery.inject(model, kind(target_modules=["0"]), adapter_name=name)
    trained(model, 0.3).double()
    for active in ["abc", "cb", "ac"]:
        surgery.set_adapter(model, [*active])
        with torch.no_grad():
            live = model(x)
            surgery.merge(model)
            # Sums of at most 36 + 3 terms, of the sizes of a convolution of 36 numbers near 1; R is in float32.
            assert torch.allclose(model(x), live, rtol=0, atol=2**-18)
            surgery.unmerge(model)


def test_two_adapters_act_in_the_order_given_as_those_of_peft_do() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(16, 8)).double(), torch.randn(4, 16).double()
    fields = {"target_modules": ["0"], "boft_block_size": 8}
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.BOFTConfig(**fields))
    theirs.add_adapter("other", peft.BOFTConfig(**fields))
    theirs.base_model.set_adapter(["default", "other"])
    ours = surgery.inject(model, surgery.BOFTConfig(**fields))
    surgery.inject(ours, surgery.BOFTConfig(**fields), adapter_name="other")
    surgery.set_adapter(ours, ["default", "other"])
    with torch.no_grad():
        held = {name.removeprefix("base_model.model."): one for name, one in theirs.named_parameters()}
        for name, values in ours.named_parameters():
            if "boft_R" in name:
                values.normal_(std=0.3)
                held[name].copy_(values)
        wanted = theirs(x)
        assert torch.allclose(ours(x), wanted, rtol=0, atol=2**-18)  # of R in float32
        surgery.set_adapter(ours, ["other", "default"])
        assert float((ours(x) - wanted).abs().max()) > 0.01
        surgery.set_adapter(ours, ["default", "other"])
        assert torch.allclose(surgery.merge(ours)(x), wanted, rtol=0, atol=2**-18)


@pytest.mark.parametrize("factors", [1, 2])
def test_dropout_leaves_out_blocks_of_one_factor_in_training_as_in_peft(factors: int) -> None:
    model = nn.Sequential(nn.Linear(64, 64, bias=False))
    fields = {"target_modules": ["0"], "boft_block_size": 8, "boft_n_butterfly_factor": factors, "boft_dropout": 0.5}
    theirs = trained(peft.get_peft_model(copy.deepcopy(model), peft.BOFTConfig(**fields)), 0.1).train()
    ours = trained(surgery.inject(copy.deepcopy(model), surgery.BOFTConfig(**fields)), 0.1).train()
    for one in (theirs, ours):
        with torch.no_grad():
            for name, values in one.named_parameters():
                if "boft_s" in name:
                    values.fill_(1)
            whole, left = one.eval()(torch.eye(64)), model(torch.eye(64))
            drops = set()
            for seed in range(12):
                torch.manual_seed(seed)
                found = one.train()(torch.eye(64))
                alone = (found - left).abs().amax(1) <= 2**-20  # of inputs that no block turns
                drops.add(int(alone.sum()))
                assert not torch.allclose(found, whole, atol=2**-10)
            assert drops == ({32} if factors == 1 else {0})


def run(*words: object) -> int:
    """A command's exit code."""
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    return int(ended.value.code or 0)


def test_it_is_merged_and_checked_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = made()
    base, adapter, out, half, back = (tmp_path / one for one in ("base", "adapter", "out", "half", "back"))
    model.save_pretrained(base)
    by_peft(model, "two factors").save_pretrained(adapter)
    for words, told in {
        ("inspect", adapter): "BOFT",
        ("plan", base, adapter): "makes each element of several others",
        ("merge", base, adapter, out, "--reversible"): "",
        ("verify", base, adapter, out): "bits",
        ("unmerge", out, back): "",
        ("merge", base, f"{adapter}=0.5", half): "",
        ("verify", base, f"{adapter}=0.5", half): "bits",
    }.items():
        assert run(*words) == 0
        assert told in capsys.readouterr().out
    assert (back / FILE).read_bytes() == (base / FILE).read_bytes()
    begun, whole, middle = (load_file(one / FILE) for one in (base, out, half))
    moved = [name for name in begun if not torch.equal(whole[name], begun[name])]
    assert len(moved) == 4
    for name in moved:  # the middle of two numbers, of which each is rounded, is
        assert torch.allclose(middle[name].double(), (whole[name].double() + begun[name].double()) / 2, rtol=2**-22)


@each_case
def test_what_is_merged_in_tiles_on_files_is_the_live_merge_and_comes_back(case: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(OrderedDict({"up": nn.Linear(64, 9000)})).bfloat16()  # of two tiles
    theirs = by_peft(model, case, target_modules=["up"])
    theirs.save_pretrained(tmp_path / "adapter")
    ours = surgery.load(copy.deepcopy(model), tmp_path / "adapter")
    changed = merge_live_and_on_files(saved(model, tmp_path / "base"), tmp_path / "adapter", ours, tmp_path)
    assert changed == {"up.weight"}


def test_half_the_strength_runs_as_it_merges(tmp_path: Path) -> None:
    model, x = made(), torch.arange(12)[None]
    by_peft(model, "three factors").save_pretrained(tmp_path / "adapter")
    ours = surgery.load(copy.deepcopy(model), tmp_path / "adapter")
    for one in (one for one in ours.modules() if isinstance(one, Adapted)):
        one.retune("default", one.fitted["default"].method.weighted(0.5))
    with torch.no_grad():
        live = ours(x)[0]
        assert within_noise(surgery.merge(ours)(x)[0], live, noise(model))
        assert not within_noise(live, model(x)[0], noise(model))
