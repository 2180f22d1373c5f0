"""FourierFT to peft and from it: outputs, gradients, files, merges, places and waves; what takes less time."""

import copy
import math
from decimal import Decimal, getcontext
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from click.testing import CliRunner
from pairs import judge_merge_of_peft, outputs, trained
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
from transformers import GPT2Config, GPT2LMHeadModel

import surgery
from surgery.cli import surgery as command
from surgery.core.arithmetic import exact_product
from surgery.core.op import WHOLE
from surgery.core.site import Site, TensorInfo
from surgery.methods.drawn_places import places
from surgery.methods.fourier import Laid, Spectral, half_places, transformed
from surgery.methods.fourierft import FourierFT
from surgery.methods.frequencies import factors, waves
from surgery.ops import OPS
from surgery.procedures.writing.small_files import RECEIPT

PART = 1.0
CASES: dict[str, dict[str, Any]] = {
    "few": {"n_frequency": 12},
    "many": {"n_frequency": 1000, "scaling": 30, "random_loc_seed": 3},
    "zeros": {"n_frequency": 50, "init_weights": True},
    "pattern": {"n_frequency": 40, "n_frequency_pattern": {"q_proj": 7, "layers.1.mlp.down_proj": 1500}},
    "biases": {"n_frequency": 40, "bias": "fourier_only"},
    "output head": {"n_frequency": 40, "modules_to_save": ["lm_head"]},
}
CPU = torch.device("cpu")
SHAPES = [(32, 48), (45, 30), (7, 14), (13, 13), (1, 9), (9, 1), (64, 2), (31, 32)]
each_case = pytest.mark.parametrize("case", CASES)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_shape = pytest.mark.parametrize("shape", SHAPES)
each_count = pytest.mark.parametrize("part", [0.02, 0.5, 1.0])


def config(case: str) -> peft.FourierFTConfig:
    return peft.FourierFTConfig(**{"target_modules": TARGETS} | copy.deepcopy(CASES[case]))


def spectrum(shape: tuple[int, int], part: float) -> tuple[FourierFT, Tensor, Tensor]:
    """A method with numbers in so much of a weight's spectrum, the numbers, and peft's delta."""
    method = FourierFT(3.0, max(1, int(shape[0] * shape[1] * part)))
    layer = peft.get_peft_model(
        nn.Sequential(nn.Linear(shape[1], shape[0])),
        peft.FourierFTConfig(n_frequency=method.count, scaling=3.0, target_modules=["0"]),
    ).base_model.model[0]
    return method, layer.fourierft_spectrum["default"].detach(), layer.get_delta_weight("default").detach()


def site(shape: tuple[int, int]) -> Site:
    return Site("0", {"weight": TensorInfo("0.weight", torch.float32, shape)}, OPS["linear"])


def held(method: FourierFT, c: Tensor, shape: tuple[int, int]) -> Any:
    return method.matrices({"c": c}, site(shape))


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
    check_fields(peft.FourierFTConfig(), surgery.FourierFTConfig(), tmp_path)


def test_a_fresh_spectrum_is_drawn_as_in_peft() -> None:
    fields, drawn = {"n_frequency": 32, "target_modules": ["0", "1"]}, []
    for make, kind in ((peft.get_peft_model, peft.FourierFTConfig), (surgery.inject, surgery.FourierFTConfig)):
        model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 5))
        torch.manual_seed(5)
        adapted: Any = make(model, kind(**fields))
        drawn.append([one.detach() for name, one in adapted.named_parameters() if "spectrum" in name])
    for wanted, found in zip(*drawn, strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("safe", [False, True], ids=["merge", "safe_merge"])
@each_dtype
@pytest.mark.parametrize("case", ["few", "many", "pattern", "biases", "output head"])
def test_a_merge_by_peft_passes_verify_and_one_that_forgot_a_tensor_does_not(
    case: str, dtype: torch.dtype, safe: bool, tmp_path: Path
) -> None:
    model = made(dtype)
    judge_merge_of_peft(model, by_peft(model, config(case), PART), tmp_path, safe)


@each_dtype
@pytest.mark.parametrize("case", ["few", "pattern"])
def test_a_merge_of_files_is_the_live_one_and_both_come_back_to_the_bit(
    case: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    check_streaming(config(case), dtype, PART, tmp_path)


def test_over_conv1d_it_gives_what_peft_gives_and_merges_as_it_does(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=24, n_layer=2, n_head=2, vocab_size=99, n_positions=32)).eval()
    fields = peft.FourierFTConfig(n_frequency=60, target_modules=["c_attn", "mlp.c_proj"], fan_in_fan_out=True)
    theirs = by_peft(model, fields, PART)
    theirs.save_pretrained(tmp_path / "adapter")
    ours = surgery.load(copy.deepcopy(model), tmp_path / "adapter")
    assert near(outputs(ours), outputs(theirs), torch.float32)
    assert apart(outputs(model), outputs(theirs)) > 100 * apart(outputs(ours), outputs(theirs))
    judge_merge_of_peft(model, theirs, tmp_path / "judged", safe=False)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 60, 97, 1000, 4096])
def test_waves_are_those_of_50_digits_within_their_bound(count: int) -> None:
    getcontext().prec = 50
    found = [[Decimal(float(one)) for one in values] for values in waves(count, CPU)]
    eighth = Decimal("0.78539816339744830961566084581987572104929234984378")
    off = Decimal(0)
    for k in range(0, count, max(1, count // 100)):
        x = 8 * eighth * k / count
        cos = sin = term = Decimal(1)
        sin = term = x
        cos = term = Decimal(1)
        sin = Decimal(0)
        for power in range(1, 70):
            term = term * x / power
            sign = 1 if power % 4 < 2 else -1
            cos, sin = (cos, sin + sign * term) if power % 2 else (cos + (-1) ** (power // 2) * term, sin)
        off = max(off, abs(found[0][k] - cos), abs(found[1][k] - sin))
    assert off <= Decimal(2) ** -51


@each_count
@each_shape
def test_the_product_is_the_transform_of_peft_within_the_spread_which_is_not_much_more(
    shape: tuple[int, int], part: float
) -> None:
    torch.manual_seed(0)
    method, c, theirs = spectrum(shape, part)
    p = held(method, c, shape)
    assert p["A"].shape[0] <= 2 * (min(shape) // 2 + 1)
    exact = method.delta(p, WHOLE, exact_product)
    spread = method.spread(p, WHOLE)
    assert bool(((theirs.double() - exact).abs() <= spread).all())
    assert bool((spread <= 1e-3 * exact.square().mean().sqrt()).all())  # a wrong number among them is told
    S = torch.zeros(shape, dtype=torch.float64)
    S[tuple(places(c, 777, shape))] = c.double()
    wide = torch.fft.ifft2(S).real * (shape[0] * shape[1])
    B, A = factors(c, places(c, 777, shape), shape)
    assert bool(((B @ A - wide).abs() <= 2**-48 * math.log2(len(c) + 2) * c.double().abs().sum()).all())
    rows = slice(shape[0] // 3, shape[0] // 2 + 1)
    assert torch.equal(method.delta(p, (rows, slice(None)), exact_product), exact[rows])


@each_count
@each_shape
def test_both_steps_are_the_transform_and_have_its_gradients(shape: tuple[int, int], part: float) -> None:
    torch.manual_seed(0)
    count = max(1, int(shape[0] * shape[1] * part))
    half = half_places(torch.empty(count), 7, shape)
    S = torch.zeros(shape, dtype=torch.float64)
    x, c = torch.randn(2, 3, shape[1], dtype=torch.float64), torch.randn(count, dtype=torch.float64)
    S[tuple(places(c, 7, shape))] = c
    W = torch.fft.ifft2(S).real
    x.requires_grad_()
    c.requires_grad_()
    room = 2**-46 * float(c.detach().abs().sum())
    assert float((transformed(c, half, shape) - W).abs().max()) <= room / (shape[0] * shape[1])
    none = torch.zeros(shape, dtype=torch.float64)
    for run in (lambda x, c: Spectral.apply(x, c, half, shape), lambda x, c: Laid.apply(x, none, None, c, half, shape)):
        assert float((run(x, c) - x @ W.T).abs().max()) <= room
        if count < 100:
            assert torch.autograd.gradcheck(run, (x, c))
            assert torch.autograd.gradgradcheck(run, (x, c))


def test_places_outlive_inference_mode_and_take_no_more_memory_than_they_are() -> None:
    with torch.inference_mode():
        at = places(torch.empty(5), 11, (40, 30))
    assert not at.is_inference()
    assert at.untyped_storage().nbytes() == at.nbytes


def test_the_command_line_merges_verifies_and_unmerges_at_half_the_strength(tmp_path: Path) -> None:
    def run(*given: object) -> str:
        done = CliRunner().invoke(command, [str(one) for one in given])
        assert done.exit_code == 0, done.output
        return done.output

    base, adapter, out, back = (tmp_path / one for one in ("base", "adapter", "out", "back"))
    made().save_pretrained(base)
    by_peft(made(), config("pattern"), PART).save_pretrained(adapter)
    assert "FourierFT" in run("inspect", adapter)
    assert "FourierFT" in run("plan", base, f"{adapter}=0.5")
    run("merge", base, f"{adapter}=0.5", out, "--reversible")
    run("verify", base, f"{adapter}=0.5", out)
    assert not surgery.verify_checkpoint(base, adapter, out).ok
    run("unmerge", out, back)
    assert (back / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()


def test_what_does_not_fit_is_refused_and_nothing_changes() -> None:
    def refused(told: str, layer: nn.Module, **fields: Any) -> None:
        model = nn.Sequential(layer)
        with pytest.raises(surgery.MatchError, match=f"^0: .*{told}"):
            surgery.inject(model, surgery.FourierFTConfig(target_modules=["0"], **fields))
        assert model[0] is layer

    refused("n_frequency is 1000, and its weight has 54 numbers", nn.Linear(6, 9))
    refused("its op is embedding; FourierFT acts on Linear and Conv1D", nn.Embedding(6, 8), n_frequency=3)
    for field in (
        {"n_frequency": 0},
        {"scaling": math.inf},
        {"random_loc_seed": None},
        {"n_frequency_pattern": None},
        {"bias": "lora_only"},
    ):
        with pytest.raises(surgery.ConfigError, match=f"^{next(iter(field))} is "):
            surgery.FourierFTConfig(**field)


def test_over_lora_and_under_c3a_it_adds_to_what_they_make_also_under_autocast() -> None:
    model = surgery.inject(made(), surgery.LoraConfig(r=2, target_modules=["q_proj"]), adapter_name="lora")
    surgery.inject(model, config("few"), adapter_name="fourier")
    surgery.inject(model, surgery.C3AConfig(block_size=16, target_modules=["q_proj"]), adapter_name="c3a")
    surgery.set_adapter(model, ["lora", "fourier", "c3a"])
    adapted = outputs(trained(model, 1 / 4))
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
    told = [FourierFT(3.0, 5, seed).settings() for seed in (7, 8)]
    assert [one["seed"] for one in told] == ["7", "8"]


KEYS = ["q_proj|v_proj", "(q|v)_proj", "self_attn.v_proj|", "layers.0.self_attn.q_proj", ".*q_proj"]


@pytest.mark.parametrize("key", [*KEYS, "model.layers.1.self_attn.v_proj", "model.layers.1.self_attn.v_proj|x"])
def test_keys_of_its_pattern_mean_what_they_mean_in_peft(key: str, tmp_path: Path) -> None:
    targets = ["q_proj", "v_proj"]
    fields = peft.FourierFTConfig(n_frequency=9, target_modules=targets, n_frequency_pattern={key: 5})
    check_files(fields, torch.float32, PART, tmp_path)
    check_fresh(fields)


@pytest.mark.parametrize(
    "key", ["0", "block.0", "*.0", "re:block\\.[01]", "re:(b)lock\\.0|.*(l)\\2\\.0", "nest.block.0"]
)
def test_keys_of_ours_mean_ends_of_names_and_peft_reads_them_so(key: str, tmp_path: Path) -> None:
    def net() -> nn.Module:
        def block() -> nn.Module:
            return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))

        nest = nn.ModuleDict({"block": block()})
        return nn.ModuleDict({"nest": nest, "block": block(), "block0": nn.Linear(4, 4), "0": nn.Linear(4, 4)})

    wanted = {
        "0": {"0", "block.0", "nest.block.0"},
        "block.0": {"block.0", "nest.block.0"},
        "*.0": {"block.0", "nest.block.0"},
        "re:block\\.[01]": {"block.0", "nest.block.0", "block.1", "nest.block.1"},
        "re:(b)lock\\.0|.*(l)\\2\\.0": {"block.0", "nest.block.0"},
        "nest.block.0": {"nest.block.0"},
    }[key]
    model = surgery.inject(
        net(), surgery.FourierFTConfig(n_frequency=9, target_modules=["0", "1", "block0"], n_frequency_pattern={key: 5})
    )
    surgery.save(model, tmp_path)
    for one in (model, peft.PeftModel.from_pretrained(net(), tmp_path)):
        found = {name: len(v) for name, v in one.named_parameters() if "spectrum" in name}
        short = {
            name.partition(".fourierft")[0].removeprefix("base_model.model.") for name in found if found[name] == 5
        }
        assert short == wanted
