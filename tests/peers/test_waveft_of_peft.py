"""WaveFT to peft and from it: outputs, gradients, files, merges, filters, and what each number brings back."""

import copy
import math
from pathlib import Path
from typing import Any
from weakref import ref

import peft
import pytest
import torch
from click.testing import CliRunner
from pairs import judge_merge_of_peft, outputs, trained
from peft.tuners.waveft.wavelet import Wavelet
from placed_pairs import (
    DTYPES,
    TARGETS,
    apart,
    by_peft,
    check_fields,
    check_files,
    check_fresh,
    check_gradients,
    check_streaming,
    made,
    near,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import GPT2Config, GPT2LMHeadModel

import surgery
from surgery.cli import surgery as command
from surgery.core.arithmetic import exact_product
from surgery.core.op import WHOLE
from surgery.core.site import Site, TensorInfo
from surgery.methods.drawn_places import one_of_each
from surgery.methods.waveft import WaveFT
from surgery.methods.wavelets import FILTERS
from surgery.ops import OPS
from surgery.procedures.writing.small_files import RECEIPT

PART = 0.25
CASES: dict[str, dict[str, Any]] = {
    "few": {"n_frequency": 12},
    "many": {"n_frequency": 1000, "scaling": 3, "random_loc_seed": 3},
    "drawn": {"n_frequency": 50, "init_weights": False},
    "of four": {"n_frequency": 200, "scaling": 5, "wavelet_family": "db2"},
    "coiflet": {"n_frequency": 200, "scaling": 5, "wavelet_family": "coif1"},
    "of the weight": {"n_frequency": 200, "use_idwt": False},
    "of the weight, by a filter that is not used": {"n_frequency": 200, "use_idwt": False, "wavelet_family": "sym8"},
    "pattern": {"n_frequency": 40, "n_frequency_pattern": {"q_proj": 7, "layers.1.mlp.down_proj": 1500}},
    "biases": {"n_frequency": 40, "bias": "waveft_only"},
    "output head": {"n_frequency": 40, "modules_to_save": ["lm_head"]},
}
SHAPES = [(32, 48), (45, 30), (7, 14), (13, 13), (1, 9), (9, 1), (64, 2)]
each_case = pytest.mark.parametrize("case", CASES)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def config(case: str) -> peft.WaveFTConfig:
    return peft.WaveFTConfig(**{"target_modules": TARGETS} | copy.deepcopy(CASES[case]))


@each_dtype
@each_case
def test_what_peft_saves_gives_its_outputs_here_and_back_again(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    check_files(config(case), dtype, PART, tmp_path)


@each_case
def test_a_config_hits_the_same_modules_with_the_same_shapes_as_in_peft(case: str) -> None:
    check_fresh(config(case))


@pytest.mark.parametrize("case", [one for one in CASES if one != "output head"])  # which sums 99 numbers back
def test_gradients_are_those_of_peft(case: str, tmp_path: Path) -> None:
    check_gradients(config(case), PART, tmp_path)


def test_every_field_that_peft_writes_is_read_and_written_again(tmp_path: Path) -> None:
    check_fields(peft.WaveFTConfig(), surgery.WaveFTConfig(), tmp_path)


def test_a_fresh_spectrum_is_drawn_as_in_peft() -> None:
    fields, drawn = {"n_frequency": 32, "target_modules": ["0", "1"], "init_weights": False}, []
    for make, kind in ((peft.get_peft_model, peft.WaveFTConfig), (surgery.inject, surgery.WaveFTConfig)):
        model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 5))
        torch.manual_seed(5)
        adapted: Any = make(model, kind(**fields))
        drawn.append([one.detach() for name, one in adapted.named_parameters() if "spectrum" in name])
    for wanted, found in zip(*drawn, strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("safe", [False, True], ids=["merge", "safe_merge"])
@each_dtype
@pytest.mark.parametrize("case", ["few", "many", "coiflet", "of the weight", "pattern", "biases", "output head"])
def test_a_merge_by_peft_passes_verify_and_one_that_forgot_a_tensor_does_not(
    case: str, dtype: torch.dtype, safe: bool, tmp_path: Path
) -> None:
    model = made(dtype)
    judge_merge_of_peft(model, by_peft(model, config(case), PART), tmp_path, safe)


@each_dtype
@pytest.mark.parametrize("case", ["many", "of four", "pattern"])
def test_a_merge_of_files_is_the_live_one_and_both_come_back_to_the_bit(
    case: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    check_streaming(config(case), dtype, PART, tmp_path)


def test_over_conv1d_it_gives_what_peft_gives_and_merges_as_it_does(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=24, n_layer=2, n_head=2, vocab_size=99, n_positions=32)).eval()
    fields = peft.WaveFTConfig(n_frequency=60, target_modules=["c_attn", "mlp.c_proj"], fan_in_fan_out=True)
    theirs = by_peft(model, fields, PART)
    theirs.save_pretrained(tmp_path / "adapter")
    ours = surgery.load(copy.deepcopy(model), tmp_path / "adapter")
    assert near(outputs(ours), outputs(theirs), torch.float32)
    assert apart(outputs(model), outputs(theirs)) > 100 * apart(outputs(ours), outputs(theirs))
    judge_merge_of_peft(model, theirs, tmp_path / "judged", safe=False)


@pytest.mark.parametrize("family", FILTERS)
def test_a_filter_is_the_one_that_peft_has_a_table_of(family: str) -> None:
    found, wanted = FILTERS[family], Wavelet(family).rec_lo
    # Its numbers have from 11 decimals on.
    assert all(abs(one / math.sqrt(2) - other) < 1e-11 for one, other in zip(found, wanted, strict=True))
    assert abs(sum(one * one for one in found) / 2 - 1) < 8 * 2**-52  # it keeps norms
    for turn in range(2, len(found), 2):
        assert abs(sum(one * other for one, other in zip(found, found[turn:], strict=False))) < 8 * 2**-52


@pytest.mark.parametrize("part", [0.05, 0.5, 1.0])
@pytest.mark.parametrize("family", [*FILTERS, None])
@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_brought_back_is_what_peft_has_within_the_spread_which_is_not_much_more(
    shape: tuple[int, int], family: str | None, part: float
) -> None:
    torch.manual_seed(0)
    method = WaveFT(3.0, max(1, int(shape[0] * shape[1] * part)), family)
    named = {"use_idwt": False} if family is None else {"wavelet_family": family}
    fields = {"n_frequency": method.count, "scaling": 3.0, "target_modules": ["0"], "init_weights": False}
    layer = nn.Sequential(nn.Linear(shape[1], shape[0]))
    theirs = peft.get_peft_model(layer, peft.WaveFTConfig(**fields, **named)).base_model.model[0]
    c, wanted = theirs.waveft_spectrum["default"].detach(), theirs.get_delta_weight("default").detach().double()
    site = Site("0", {"weight": TensorInfo("0.weight", torch.float32, shape)}, OPS["linear"])
    p = method.matrices({"c": c}, site)
    found, spread = method.delta(p, WHOLE, exact_product), method.spread(p, WHOLE)
    assert bool(((found - wanted).abs() <= spread).all())
    assert bool((spread <= 1e-4 * found.abs().max()).all())
    assert torch.equal((spread > 0) | (found == 0), torch.ones(shape, dtype=torch.bool))
    tile = slice(shape[0] // 3, shape[0] // 2 + 1), slice(0, shape[1] // 2 + 1)
    assert torch.equal(method.delta(p, tile, exact_product), found[tile])


def test_the_command_line_merges_verifies_and_unmerges_at_half_the_strength(tmp_path: Path) -> None:
    def run(*given: object) -> str:
        done = CliRunner().invoke(command, [str(one) for one in given])
        assert done.exit_code == 0, done.output
        return done.output

    base, adapter, out, back = (tmp_path / one for one in ("base", "adapter", "out", "back"))
    made().save_pretrained(base)
    by_peft(made(), config("pattern"), PART).save_pretrained(adapter)
    assert "WaveFT" in run("inspect", adapter)
    assert "WaveFT" in run("plan", base, f"{adapter}=0.5")
    run("merge", base, f"{adapter}=0.5", out, "--reversible")
    run("verify", base, f"{adapter}=0.5", out)
    assert not surgery.verify_checkpoint(base, adapter, out).ok
    run("unmerge", out, back)
    assert (back / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()


def test_what_does_not_fit_is_refused_and_nothing_changes() -> None:
    def refused(told: str, layer: nn.Module, **fields: Any) -> None:
        model = nn.Sequential(layer)
        with pytest.raises(surgery.MatchError, match=f"^0: .*{told}"):
            surgery.inject(model, surgery.WaveFTConfig(target_modules=["0"], **fields))
        assert model[0] is layer

    refused("n_frequency is 2592, and its weight has 54 numbers", nn.Linear(6, 9))
    refused("its op is embedding; WaveFT acts on Linear and Conv1D", nn.Embedding(6, 8), n_frequency=3)
    for field in (
        {"n_frequency": 0},
        {"scaling": math.nan},
        {"random_loc_seed": None},
        {"n_frequency_pattern": None},
        {"bias": "lora_only"},
        {"wavelet_family": "db4"},
        {"wavelet_family": None, "use_idwt": False},
    ):
        with pytest.raises(surgery.ConfigError, match=f"^{next(iter(field))} is "):
            surgery.WaveFTConfig(**field)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"wavelet_family": "sym4"}, "wavelet_family is 'sym4'; one of 'db1', .* whose filters have a closed form"),
        (
            {"proportional_parameters": True},
            "proportional_parameters is 'True'; how many numbers .* n_frequency_pattern",
        ),
    ],
    ids=["filter", "proportional"],
)
def test_files_of_what_is_not_here_are_refused_with_the_reason(
    fields: dict[str, Any], told: str, tmp_path: Path
) -> None:
    given = {"n_frequency": 40, "target_modules": TARGETS} | fields
    by_peft(made(), peft.WaveFTConfig(**given), PART).save_pretrained(tmp_path)
    with pytest.raises(surgery.FormatError, match=told):
        surgery.load(made(), tmp_path)


def test_over_lora_and_under_shira_it_adds_to_what_they_make_also_under_autocast() -> None:
    model = surgery.inject(made(), surgery.LoraConfig(r=2, target_modules=["q_proj"]), adapter_name="lora")
    surgery.inject(model, config("of four"), adapter_name="wave")
    surgery.inject(model, surgery.ShiraConfig(r=4, target_modules=["q_proj"]), adapter_name="shira")
    surgery.set_adapter(model, ["lora", "wave", "shira"])
    adapted = outputs(trained(model, PART))
    assert not near(adapted, outputs(made()), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert near(outputs(model), adapted, torch.bfloat16)
    assert near(outputs(surgery.merge(model)), adapted, torch.float32)
    assert torch.equal(outputs(surgery.eject(model)), outputs(made()))


def test_plans_and_merges_say_that_its_places_have_to_be_drawn(tmp_path: Path) -> None:
    made().save_pretrained(tmp_path / "base")
    by_peft(made(), config("few"), PART).save_pretrained(tmp_path / "adapter")
    told = "the places of its numbers are not in it: they are drawn from its seed"
    assert any(told in one for one in surgery.plan(tmp_path / "base", tmp_path / "adapter").notes)
    surgery.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert told in (tmp_path / "out" / RECEIPT).read_text()


def test_settings_tell_merges_of_the_same_tensors_apart() -> None:
    told = [WaveFT(3.0, 5, family, seed).settings() for family, seed in (("db2", 7), (None, 8))]
    assert [(one["seed"], one["wavelet"]) for one in told] == [("7", "db2"), ("8", "none")]


@pytest.mark.parametrize("family", FILTERS)
def test_no_place_has_more_numbers_than_a_filter_brings_there(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parts: list[int] = []

    def counted(group: Tensor) -> list[Tensor]:
        found = one_of_each(group)
        parts.append(len(found))
        return found

    monkeypatch.setattr("surgery.methods.waveft.one_of_each", counted)
    shape = (40, 30)
    site = Site("0", {"weight": TensorInfo("0.weight", torch.float32, shape)}, OPS["linear"])
    WaveFT(3.0, 1200, family).matrices({"c": torch.randn(1200)}, site)
    assert 0 < parts[0] <= len(FILTERS[family]) ** 2


class Held(TorchDispatchMode):
    """The most bytes that tensors made within it take at once."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[Any] = []
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.made += [ref(one) for one in tree_leaves(out) if isinstance(one, Tensor)]
        live = [one.untyped_storage() for weak in self.made if (one := weak()) is not None]
        self.most = max(self.most, sum({one.data_ptr(): one.nbytes() for one in live}.values()))
        return out


@pytest.mark.parametrize("family", ["db1", "coif1", None])
def test_a_plan_counts_the_memory_that_its_matrices_take(family: str | None) -> None:
    site = Site("0", {"weight": TensorInfo("0.weight", torch.float32, (200, 150))}, OPS["linear"])
    method = WaveFT(3.0, 9000, family, seed=12345)
    with Held() as held:
        method.matrices({"c": torch.randn(9000)}, site)
    assert held.most <= method.work_bytes(site) <= 3 * held.most
