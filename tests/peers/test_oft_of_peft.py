"""OFT to peft and from it: outputs, gradients, files and merges; and where peft's own are wrong."""

import copy
import json
from collections import OrderedDict
from collections.abc import Mapping
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
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import surgery
from surgery.cli import main
from surgery.core.rounding import ulp
from surgery.errors import ConfigError, FormatError, MatchError

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99}
TARGETS: dict[str, Any] = {"target_modules": ["q_proj", "down_proj", "embed_tokens"]}
CASES: Mapping[str, dict[str, Any]] = {
    "series": {"oft_block_size": 8},
    "blocks": {"r": 3, "oft_block_size": 0},  # which does not divide
    "cayley": {"oft_block_size": 16, "use_cayley_neumann": False},
    "shared": {"oft_block_size": 4, "block_share": True},
    "constrained": {"oft_block_size": 8, "coft": True, "eps": 0.5},
    "constrained cayley": {"oft_block_size": 8, "coft": True, "eps": 0.5, "use_cayley_neumann": False},
    "two terms": {"oft_block_size": 8, "num_cayley_neumann_terms": 2},
    "three terms": {"oft_block_size": 8, "num_cayley_neumann_terms": 3},
    "eight terms": {"oft_block_size": 8, "num_cayley_neumann_terms": 8},
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EMBEDDING = "base_model.model.model.embed_tokens.base_layer.weight"
each_case = pytest.mark.parametrize("case", CASES)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
pytestmark = pytest.mark.filterwarnings("ignore:Invalid")


def made(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL, attention_bias=True)).to(dtype).eval()


def config(case: str, **fields: Any) -> peft.OFTConfig:
    return peft.OFTConfig(**TARGETS | CASES[case] | fields)


def by_peft(model: nn.Module, case: str, **fields: Any) -> peft.PeftModel:
    return trained(peft.get_peft_model(copy.deepcopy(model), config(case, **fields)), 0.1)


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
    assert {*found} == {*told} - {EMBEDDING}  # of which peft saves the base's weight too
    assert all(torch.equal(found[name], told[name]) for name in found)
    again = peft.PeftModel.from_pretrained(model, tmp_path / "ours").eval()
    assert within_noise(outputs(again), wanted, floor)


@each_case
def test_a_config_hits_the_same_modules_with_the_same_shapes_and_changes_nothing(case: str) -> None:
    wanted = trainable(peft.get_peft_model(made(), config(case)))
    ours = surgery.inject(made(), config(case))
    assert trainable(ours) == wanted
    assert torch.equal(outputs(ours), outputs(made()))
    random = surgery.inject(made(), config(case, init_weights=False))
    numbers = torch.cat([values.flatten() for values in random.parameters() if values.requires_grad])
    assert abs(float(numbers.detach().std()) - 0.1) < 0.1 * 4 / (2 * len(numbers)) ** 0.5  # four errors of a deviation
    assert not torch.equal(outputs(random), outputs(made()))


@each_case
def test_training_goes_as_in_peft(case: str) -> None:
    """Of three steps; each gradient is off by roundings of sums alone, in float64 here and float32 there."""
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
    peft.OFTConfig().save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert surgery.OFTConfig().to_json() == written
    assert surgery.OFTConfig.from_json(written) == surgery.OFTConfig()
    for fields in ({"peft_version": "0.17.1"}, {"peft_version": None}):
        with pytest.raises(FormatError, match=r"meant another series before 0\.18"):
            surgery.OFTConfig.from_json({**written, **fields})
    assert surgery.OFTConfig.from_json({**written, "peft_version": "0.17.1", "use_cayley_neumann": False})


def test_a_file_without_its_block_size_is_told_apart_from_the_method_before() -> None:
    written = surgery.OFTConfig(r=4, oft_block_size=0).to_json()
    without = {name: value for name, value in written.items() if name != "oft_block_size"}
    with pytest.raises(FormatError, match="put it back: 0, as r counts the blocks"):
        surgery.OFTConfig.from_json(without)
    assert surgery.OFTConfig.from_json({**without, "oft_block_size": 0}) == surgery.OFTConfig(r=4, oft_block_size=0)
    with pytest.raises(FormatError, match="put it back: the inputs of a block"):
        surgery.OFTConfig.from_json({**without, "r": 0})
    with pytest.raises(FormatError, match=r"another method before PEFT 0\.14"):
        surgery.OFTConfig.from_json({**without, "rank_pattern": {}, "alpha_pattern": {}})


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"r": 4}, "r is 4 and oft_block_size is 32; just one of them must be 0"),
        ({"oft_block_size": 0}, "r is 0 and oft_block_size is 0; just one of them must be 0"),
        ({"eps": -1}, "eps is -1; a number from 0"),
        ({"module_dropout": 1.0}, r"module_dropout is 1\.0; .* below 1"),
        ({"num_cayley_neumann_terms": 0}, "num_cayley_neumann_terms is 0"),
        ({"bias": "lora_only"}, "'none', 'all' or 'oft_only' is wanted"),
    ],
)
def test_a_value_that_cannot_be_is_refused_by_name(fields: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        surgery.OFTConfig(**fields)


@pytest.mark.parametrize("bias", ["all", "oft_only"])
def test_biases_that_peft_trains_are_trained_here_and_come_back(bias: str, tmp_path: Path) -> None:
    theirs = by_peft(made(), "series", bias=bias)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = surgery.load(made(), tmp_path / "theirs", trainable=True)
    assert within_noise(outputs(ours), outputs(theirs), noise(made()))
    surgery.save(ours, tmp_path / "ours")
    found, told = (load_file(tmp_path / one / "adapter_model.safetensors") for one in ("ours", "theirs"))
    biases = {name for name in found if name.endswith(".bias")}
    assert len(biases) == 2 * (1 if bias == "oft_only" else 4)
    assert {name for name in trainable(ours) if name.endswith("bias")}
    assert {*found} == {*told} - {EMBEDDING}  # of which peft saves the base's weight too
    assert all(torch.equal(found[name], told[name]) for name in found)


@each_merge(CASES, DTYPES)
def test_a_merge_by_peft_passes_verify_and_one_that_forgot_a_tensor_does_not(
    case: str, dtype: torch.dtype, safe: bool, tmp_path: Path
) -> None:
    model = made(dtype)
    judge_merge_of_peft(model, by_peft(model, case), tmp_path, safe)


class Places(nn.Module):
    """Convolutions, one of one place."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 1100, 1, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.narrow(torch.relu(self.wide(x)))


@each_dtype
@pytest.mark.parametrize("case", ["series", "cayley", "shared", "constrained"])
def test_a_convolution_of_one_place_is_as_in_peft_and_merges_to_the_same_bits_everywhere(
    case: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model, x = Places().to(dtype).eval(), torch.randn(2, 3, 8, 8).to(dtype)
    theirs = by_peft(model, case, target_modules=["narrow"])
    theirs.save_pretrained(tmp_path / "adapter")
    ours = surgery.load(copy.deepcopy(model), tmp_path / "adapter")
    with torch.no_grad():
        apart = (ours(x) - theirs(x)).abs().max()
        floor = (model(x).double() - copy.deepcopy(model).double()(x.double())).abs().max()
        assert float(apart) <= 8 * float(floor)
        assert float((ours(x) - model(x)).abs().max()) > 8 * float(floor)
        assert torch.equal(ours(x[:1])[0], ours(x[0]))  # without a batch
    changed = merge_live_and_on_files(saved(model, tmp_path / "base"), tmp_path / "adapter", ours, tmp_path)
    assert changed == {"narrow.weight"}


@each_case
def test_what_is_merged_in_tiles_on_files_is_the_live_merge_and_comes_back(case: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    layers = {"embed_tokens": nn.Embedding(9000, 64), "lm_head": nn.Linear(64, 9000)}  # of two tiles each
    model = nn.Sequential(OrderedDict(layers)).bfloat16()
    theirs = by_peft(model, case, target_modules=[*layers])
    theirs.save_pretrained(tmp_path / "adapter")
    ours = surgery.load(copy.deepcopy(model), tmp_path / "adapter")
    changed = merge_live_and_on_files(saved(model, tmp_path / "base"), tmp_path / "adapter", ours, tmp_path)
    assert changed == {f"{name}.weight" for name in layers}
    told = surgery.plan(tmp_path / "base", tmp_path / "adapter")
    assert [one["undo"] for one in told.to_json()["changes"]] == ["copy", "copy"]
    assert any("keeps the weights whole: 2 of them" in note for note in told.notes)


def test_a_convolution_over_more_places_is_refused_where_peft_changes_its_outputs_at_once(tmp_path: Path) -> None:
    model, x = Places().eval(), torch.randn(2, 3, 8, 8)
    fields = {"target_modules": ["wide"], "oft_block_size": 3}
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.OFTConfig(**fields)).eval()
    with torch.no_grad():
        assert float((theirs(x) - model(x)).abs().max()) > 0.1  # a defect of peft: nothing is trained yet
    with pytest.raises(
        MatchError, match=r"wide: a convolution over \[3, 3\], for which PEFT's OFT changes the outputs"
    ):
        surgery.inject(model, surgery.OFTConfig(**fields))
    theirs.save_pretrained(tmp_path / "adapter")
    report = surgery.plan(saved(model, tmp_path / "base"), tmp_path / "adapter")
    assert "a convolution over [3, 3]" in str(report.refusals[0])


def test_two_adapters_act_in_the_order_given_where_those_of_peft_do_so_only_once_merged() -> None:
    """A defect of peft: its forward rotates inputs by the first adapter first, which is the merge in reverse order."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(16, 8)).double(), torch.randn(4, 16).double()
    fields = {"target_modules": ["0"], "oft_block_size": 8}
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.OFTConfig(**fields))
    theirs.add_adapter("other", peft.OFTConfig(**fields))
    theirs.base_model.set_adapter(["default", "other"])
    ours = surgery.inject(
        surgery.inject(model, fields | {"peft_type": "OFT"}), fields | {"peft_type": "OFT"}, adapter_name="other"
    )
    surgery.set_adapter(ours, ["default", "other"])
    with torch.no_grad():
        held = {name.removeprefix("base_model.model."): one for name, one in theirs.named_parameters()}
        for name, values in ours.named_parameters():
            if "oft_R" in name:
                values.normal_(std=0.3)
                held[name].copy_(values)
        live, reverse = ours(x), theirs(x)
        merged = theirs.merge_and_unload(adapter_names=["default", "other"])(x)
        assert torch.allclose(live, merged, rtol=0, atol=2**-18)  # of R in float32
        assert float((reverse - merged).abs().max()) > 0.01
        assert torch.allclose(surgery.merge(ours)(x), live, rtol=0, atol=2**-18)


def test_module_dropout_leaves_out_blocks_in_training_where_peft_never_does() -> None:
    """A defect of peft: the layer is made, and no forward calls it."""
    model, x = nn.Sequential(nn.Linear(64, 64)), torch.randn(4, 64)
    fields = {"target_modules": ["0"], "oft_block_size": 8, "module_dropout": 0.5}
    theirs = trained(peft.get_peft_model(copy.deepcopy(model), peft.OFTConfig(**fields)), 0.1)
    ours = trained(surgery.inject(copy.deepcopy(model), surgery.OFTConfig(**fields)), 0.1)
    with torch.no_grad():
        assert torch.equal(theirs.train()(x), theirs.eval()(x))
        effects = []
        for block in range(8):  # four of which are left out at a time
            alone = torch.zeros(1, 64)
            alone[:, 8 * block : 8 * block + 8] = 1
            torch.manual_seed(1)
            effects.append(torch.equal(ours.train()(alone), model(alone)))
            assert not torch.equal(ours.eval()(alone), model(alone))
    assert sum(effects) == 4


def run(*words: object) -> int:
    """A command's exit code."""
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    return int(ended.value.code or 0)


def test_it_is_merged_and_checked_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = made()
    base, adapter, out, half, back = (tmp_path / one for one in ("base", "adapter", "out", "half", "back"))
    model.save_pretrained(base)
    by_peft(model, "series").save_pretrained(adapter)
    for words, told in {
        ("inspect", adapter): "OFT",
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
    assert moved
    for name in moved:  # what is rounded is the middle by itself, and the whole, of which this takes half
        one, other, found = (tensors[name].double() for tensors in (whole, begun, middle))
        allowed = ulp(found, torch.float32) / 2 + ulp(one, torch.float32) / 4
        assert bool(((found - (one + other) / 2).abs() <= allowed).all())
    save_file(whole | {moved[0]: begun[moved[0]]}, out / FILE, {"format": "pt"})
    assert run("verify", base, adapter, out) == 4
