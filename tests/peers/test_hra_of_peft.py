"""HRA to peft and from it: outputs, gradients, files and merges."""

import copy
import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from pairs import (
    FILE,
    each_merge,
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
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import surgery
from surgery.cli import main
from surgery.errors import ConfigError, MatchError, ValueRangeError

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99}
TARGETS: dict[str, Any] = {"target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"]}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CASES: dict[str, dict[str, Any]] = {
    **{f"r {r}": {"r": r} for r in (1, 2, 5, 8)},
    "orthogonal": {"r": 3, "apply_GS": True},
    "random orthogonal": {"r": 6, "apply_GS": True, "init_weights": False},
}
each_case = pytest.mark.parametrize("case", CASES)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
pytestmark = pytest.mark.filterwarnings("ignore:The symmetric initialization")


def made(dtype: torch.dtype = torch.float32, biases: bool = False) -> nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL, attention_bias=biases)).to(dtype).eval()


def config(case: str, **fields: Any) -> peft.HRAConfig:
    return peft.HRAConfig(**TARGETS | CASES[case] | fields)


def by_peft(model: nn.Module, case: str, **fields: Any) -> peft.PeftModel:
    return trained(peft.get_peft_model(copy.deepcopy(model), config(case, **fields)), 1.0)


@each_dtype
@each_case
def test_what_peft_saves_gives_equal_outputs_here_and_back_again(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = made(dtype)
    before, theirs = outputs(model), by_peft(model, case)
    wanted, floor = outputs(theirs), noise(model)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = surgery.load(copy.deepcopy(model), tmp_path / "theirs")
    assert within_noise(outputs(ours), wanted, floor)
    assert not within_noise(outputs(ours), before, floor)
    surgery.save(ours, tmp_path / "ours")
    found, told = (load_file(tmp_path / one / "adapter_model.safetensors") for one in ("ours", "theirs"))
    assert found.keys() == told.keys()
    assert all(torch.equal(found[name], told[name]) for name in told)
    again = peft.PeftModel.from_pretrained(model, tmp_path / "ours").eval()
    assert torch.equal(outputs(again), wanted)


@each_case
def test_a_config_hits_the_same_modules_with_the_same_shapes_and_an_even_one_changes_nothing(case: str) -> None:
    wanted = trainable(peft.get_peft_model(made(), config(case)))
    ours = surgery.inject(made(), config(case))
    assert trainable(ours) == wanted
    r, even = CASES[case]["r"], CASES[case] in ({"r": 2}, {"r": 8})
    assert torch.equal(outputs(ours), outputs(made())) == even
    assert not torch.equal(outputs(surgery.inject(made(), config(case, init_weights=False))), outputs(made()))
    bound = (r // 2 if even else r) ** -0.5
    for name, values in ours.named_parameters():
        if "hra_u" in name:
            assert 0.9 * bound < float(values.detach().abs().max()) <= bound


@each_case
def test_training_goes_as_in_peft(case: str) -> None:
    """Of three steps from the same vectors; gradients are off by roundings of sums of at most 64 terms."""
    theirs, ours = by_peft(made(), case).train(), surgery.inject(made(), config(case)).train()
    held = {name.removeprefix("base_model.model."): values for name, values in theirs.named_parameters()}
    with torch.no_grad():
        for name, values in ours.named_parameters():
            if "hra_u" in name:
                values.copy_(held[name])
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


def test_every_field_that_peft_writes_is_read_and_written_again_and_a_start_that_is_noise_is_refused(
    tmp_path: Path,
) -> None:
    peft.HRAConfig().save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert surgery.HRAConfig().to_json() == written
    assert surgery.HRAConfig.from_json(written) == surgery.HRAConfig()
    with pytest.raises(ConfigError, match="apply_GS is true and r is 8, which starts with pairs of equal vectors"):
        surgery.inject(made(), surgery.HRAConfig(apply_GS=True, **TARGETS))
    with pytest.raises(ConfigError, match="r is 0"):
        surgery.HRAConfig(r=0)
    with pytest.raises(ConfigError, match="'none', 'all' or 'hra_only' is wanted"):
        surgery.HRAConfig(bias="lora_only")  # type: ignore[arg-type]


def test_gram_schmidt_of_peft_reflects_what_rounding_leaves_of_its_start(tmp_path: Path) -> None:
    """A defect of peft, for which such a start is refused: of two equal vectors the second becomes noise."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 64)), torch.randn(4, 64)
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.HRAConfig(r=2, apply_GS=True, target_modules=["0"]))
    H = theirs.base_model.model[0].get_delta_weight("default").detach()
    u = theirs.base_model.model[0].hra_u["default"].detach()[:, 0]
    alone = torch.eye(64) - 2 * torch.outer(u, u) / u.square().sum()
    assert float((H - alone).norm()) > 0.5  # one more reflection, or NaN, by no vector of the adapter
    assert float((theirs(x) - model(x)).abs().max()) > 0.1
    theirs.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueRangeError, match=r"0\.weight: a vector of U .* apply_GS leaves less than 2\^-12 of it"):
        surgery.merge_checkpoint(saved(model, tmp_path / "base"), tmp_path / "adapter", tmp_path / "out")


@pytest.mark.parametrize("bias", ["all", "hra_only"])
def test_biases_that_peft_trains_are_trained_here_and_come_back(bias: str, tmp_path: Path) -> None:
    theirs = by_peft(made(biases=True), "r 2", bias=bias)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = surgery.load(made(biases=True), tmp_path / "theirs", trainable=True)
    assert within_noise(outputs(ours), outputs(theirs), noise(made(biases=True)))
    surgery.save(ours, tmp_path / "ours")
    found, told = (load_file(tmp_path / one / "adapter_model.safetensors") for one in ("ours", "theirs"))
    assert len([name for name in told if name.endswith(".bias")]) == 2 * (2 if bias == "hra_only" else 4)
    assert found.keys() == told.keys()
    assert all(torch.equal(found[name], told[name]) for name in told)


@each_merge(CASES, DTYPES)
def test_a_merge_by_peft_passes_verify_and_one_that_forgot_a_tensor_does_not(
    case: str, dtype: torch.dtype, safe: bool, tmp_path: Path
) -> None:
    model = made(dtype)
    judge_merge_of_peft(model, by_peft(model, case), tmp_path, safe)


@each_dtype
@each_case
def test_what_is_merged_in_tiles_on_files_is_the_live_merge_and_comes_back(
    case: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    layers = {"up": nn.Linear(64, 9000), "place": nn.Conv2d(64, 9000, 1)}  # of two tiles each
    model = nn.Sequential(OrderedDict(layers)).to(dtype)
    ours = trained(
        surgery.inject(copy.deepcopy(model), surgery.HRAConfig(**CASES[case], target_modules=[*layers])), 1.0
    )
    surgery.save(ours, tmp_path / "adapter")
    with torch.no_grad():
        x = torch.randn(3, 64, 2, 5).to(dtype)
        ours.place.hra_u["default"].copy_(ours.up.hra_u["default"])
        ours.place.base_weight.copy_(ours.up.base_weight[:, :, None, None])
        found, wanted = ours.place(x), ours.up(x.movedim(1, -1)).movedim(-1, 1)
        bias = ours.up.bias - ours.place.bias
        # A place is rotated as an input is, by sums of 64 terms in another order.
        size = 64 * torch.finfo(dtype).eps * float(wanted.abs().max())
        assert float((found + bias[:, None, None] - wanted).abs().max()) <= size
    ours = surgery.load(copy.deepcopy(model), tmp_path / "adapter")
    changed = merge_live_and_on_files(saved(model, tmp_path / "base"), tmp_path / "adapter", ours, tmp_path)
    assert changed == {"up.weight", "place.weight"}


def test_a_vector_of_zeros_reflects_nothing_and_is_refused(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    ours = trained(surgery.inject(copy.deepcopy(model), surgery.HRAConfig(r=3, target_modules=["0"])), 0.1)
    with torch.no_grad():
        ours[0].hra_u["default"][:, 1] = 0
    surgery.save(ours, tmp_path / "adapter")
    with pytest.raises(ValueRangeError, match=r"0\.weight: a vector of U is zero"):
        surgery.merge_checkpoint(saved(model, tmp_path / "base"), tmp_path / "adapter", tmp_path / "out")
    with pytest.raises(MatchError, match=r"0: a convolution over \[3, 3\], in 1 groups; HRA acts on Linear"):
        surgery.inject(nn.Sequential(nn.Conv2d(3, 4, 3)), surgery.HRAConfig(target_modules=["0"]))


def run(*words: object) -> int:
    """A command's exit code."""
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    return int(ended.value.code or 0)


def test_it_is_merged_and_checked_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, adapter, out, back = (tmp_path / one for one in ("base", "adapter", "out", "back"))
    made().save_pretrained(base)
    by_peft(made(), "r 8").save_pretrained(adapter)
    for words, told in {
        ("inspect", adapter): "HRA",
        ("plan", base, adapter): "makes each element of several others",
        ("merge", base, f"{adapter}=0.5", out, "--reversible"): "",
        ("verify", base, f"{adapter}=0.5", out): "bits",
        ("unmerge", out, back): "",
    }.items():
        assert run(*words) == 0
        assert told in capsys.readouterr().out
    assert (back / FILE).read_bytes() == (base / FILE).read_bytes()
    begun, whole = load_file(base / FILE), load_file(out / FILE)
    moved = [name for name in begun if not torch.equal(whole[name], begun[name])]
    assert len(moved) == 8
    save_file(whole | {moved[0]: begun[moved[0]]}, out / FILE, {"format": "pt"})
    assert run("verify", base, f"{adapter}=0.5", out) == 4
