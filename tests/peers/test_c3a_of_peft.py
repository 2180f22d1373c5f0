"""C3A to peft and from it: outputs, gradients, files, merges, its transforms, and where peft is wrong."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from click.testing import CliRunner
from pairs import each_merge, judge_merge_of_peft, outputs, trained
from peft.tuners.c3a.utils import BlockCircularConvolution, get_circulant_fast
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

import surgery
from surgery.cli import surgery as command
from surgery.core.op import WHOLE
from surgery.methods.c3a import C3A
from surgery.methods.circular import Circular, circular

PART = 2.0  # the number of inputs divides what is added
CASES: dict[str, dict[str, Any]] = {
    "xavier": {"block_size": 16},
    "zeros": {"block_size": 8, "init_weights": True},
    "gaussian": {"block_size": 2, "init_weights": "gaussian"},
    "kaiming": {"block_size": 1, "init_weights": "kaiming_uniform"},
    "pattern": {"block_size": 16, "block_size_pattern": {"q_proj": 32, "layers.1.mlp.down_proj": 4}},
    "biases": {"block_size": 16, "bias": "c3a_only"},
    "output head": {"block_size": 16, "modules_to_save": ["lm_head"]},
}
each_case = pytest.mark.parametrize("case", CASES)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_length = pytest.mark.parametrize(
    ("inputs", "outputs", "block"), [(32, 48, 16), (45, 30, 15), (14, 21, 7), (26, 13, 13), (512, 256, 256), (6, 4, 1)]
)


def config(case: str) -> peft.C3AConfig:
    return peft.C3AConfig(**{"target_modules": TARGETS} | copy.deepcopy(CASES[case]))


@each_dtype
@each_case
def test_what_peft_saves_gives_its_outputs_here_and_back_again(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    check_files(config(case), dtype, PART, tmp_path)


@each_case
def test_a_config_hits_the_same_modules_with_the_same_shapes_as_in_peft(case: str) -> None:
    check_fresh(config(case))


@pytest.mark.parametrize("block", [1, 2, 16])
def test_gradients_of_a_kernel_over_which_no_other_lies_are_those_of_peft(block: int, tmp_path: Path) -> None:
    check_gradients(peft.C3AConfig(block_size=block, target_modules=["layers.1.mlp.down_proj"]), PART, tmp_path)


@pytest.mark.parametrize("block", [2, 3, 8])
def test_the_gradient_that_peft_passes_on_to_an_input_is_wrong_for_blocks_of_more_than_two(block: int) -> None:
    """It takes the kernel the other way round; so what lies below such a layer is trained by wrong gradients."""
    torch.manual_seed(0)
    x, w = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 2 * block), (1, 2, block)))
    wanted = torch.autograd.grad(circular(x, w).square().sum(), (x, w))
    found, theirs = (
        torch.autograd.grad(run(x, w).square().sum(), (x, w))
        for run in (Circular.apply, BlockCircularConvolution.apply)
    )
    # The transforms of some 10 passes each, in float64.
    room = [100 * torch.finfo(torch.float64).eps * float(one.norm()) for one in wanted]
    assert all(apart_wide(one, other) <= most for one, other, most in zip(found, wanted, room, strict=True))
    assert apart_wide(theirs[1], wanted[1]) <= room[1]
    assert (apart_wide(theirs[0], wanted[0]) <= room[0]) == (block <= 2)


def apart_wide(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


def test_every_field_that_peft_writes_is_read_and_written_again(tmp_path: Path) -> None:
    check_fields(peft.C3AConfig(), surgery.C3AConfig(), tmp_path)


@pytest.mark.parametrize("start", ["gaussian", "kaiming_uniform", "xavier_uniform", False])
def test_a_fresh_kernel_is_drawn_as_in_peft(start: Any) -> None:
    fields = {"block_size": 32, "target_modules": ["0"], "init_weights": start}
    kernels = []
    for make, kind in ((peft.get_peft_model, peft.C3AConfig), (surgery.inject, surgery.C3AConfig)):
        model = nn.Sequential(nn.Linear(64, 32))
        torch.manual_seed(5)
        adapted: Any = make(model, kind(**fields))
        kernels.append(next(one for name, one in adapted.named_parameters() if "c3a_kernel" in name).detach())
    wanted, found = kernels
    assert torch.equal(found, wanted)
    assert bool(wanted.any())


@each_merge(["xavier", "gaussian", "pattern", "biases", "output head"], DTYPES)
def test_a_merge_by_peft_passes_verify_and_one_that_forgot_a_tensor_does_not(
    case: str, dtype: torch.dtype, safe: bool, tmp_path: Path
) -> None:
    model = made(dtype)
    judge_merge_of_peft(model, by_peft(model, config(case), PART), tmp_path, safe)


@each_dtype
@pytest.mark.parametrize("case", ["xavier", "pattern"])
def test_a_merge_of_files_is_the_live_one_and_both_come_back_to_the_bit(
    case: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    check_streaming(config(case), dtype, PART, tmp_path)


@each_length
def test_the_blocks_are_those_of_peft_within_the_spread_which_is_not_much_more(
    inputs: int, outputs: int, block: int
) -> None:
    torch.manual_seed(0)
    w = torch.randn(outputs // block, inputs // block, block)
    method = C3A(1.0, block)
    exact = method.numbers({"w": w.double()}, WHOLE)
    off = (get_circulant_fast(w) / inputs).double() - exact
    spread = method.spread({"w": w}, WHOLE)
    assert bool((off.abs() <= spread).all())
    assert bool((spread <= 1e-3 * exact.norm(dim=1).mean()).all())  # of a row: a wrong number in it is told
    rows = slice(outputs // 3, outputs // 2)
    assert torch.equal(method.numbers({"w": w.double()}, (rows, slice(None))), exact[rows])


@each_length
def test_its_transforms_are_the_blocks_within_the_spread_and_one_step_has_their_gradients(
    inputs: int, outputs: int, block: int
) -> None:
    torch.manual_seed(0)
    w = torch.randn(outputs // block, inputs // block, block, requires_grad=True)
    x, method = torch.randn(3, inputs, requires_grad=True), C3A(1.0, block)
    exact = method.numbers({"w": w.detach().double()}, WHOLE)
    wanted = x.detach().double() @ exact.T
    room = x.detach().double().abs() @ method.spread({"w": w.detach()}, WHOLE).T
    for run in (circular, Circular.apply):
        assert bool(((run(x, w).double() / inputs - wanted).abs() <= room).all())
    wide = x.detach().double().requires_grad_(), w.detach().double().requires_grad_()
    if inputs < 100:
        assert torch.autograd.gradcheck(Circular.apply, wide)
        assert torch.autograd.gradgradcheck(Circular.apply, wide)


def test_the_command_line_merges_verifies_and_unmerges_at_half_the_strength(tmp_path: Path) -> None:
    def run(*given: object) -> str:
        done = CliRunner().invoke(command, [str(one) for one in given])
        assert done.exit_code == 0, done.output
        return done.output

    base, adapter, out, back = (tmp_path / one for one in ("base", "adapter", "out", "back"))
    made().save_pretrained(base)
    by_peft(made(), config("pattern"), PART).save_pretrained(adapter)
    assert "C3A" in run("inspect", adapter)
    assert "C3A" in run("plan", base, f"{adapter}=0.5")
    run("merge", base, f"{adapter}=0.5", out, "--reversible")
    run("verify", base, f"{adapter}=0.5", out)
    assert not surgery.verify_checkpoint(base, adapter, out).ok
    run("unmerge", out, back)
    assert (back / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()


def test_what_does_not_fit_is_refused_and_nothing_changes() -> None:
    def refused(told: str, layer: nn.Module, **fields: Any) -> None:
        model = nn.Sequential(layer)
        with pytest.raises(surgery.MatchError, match=f"^0: .*{told}"):
            surgery.inject(model, surgery.C3AConfig(target_modules=["0"], **fields))
        assert model[0] is layer

    refused("block_size is 256, of which its 6 inputs and 9 outputs are no multiples; .* such as 3", nn.Linear(6, 9))
    refused("its op is embedding; C3A acts on Linear", nn.Embedding(6, 8), block_size=2)
    for field in (
        {"block_size": 0},
        {"block_size_pattern": None},
        {"init_weights": "x"},
        {"init_weights": None},
        {"bias": "lora_only"},
    ):
        with pytest.raises(surgery.ConfigError, match=f"^{next(iter(field))} is "):
            surgery.C3AConfig(**field)
    with pytest.raises(surgery.ConfigError, match=r"block_size_pattern\['a'\] is 0"):
        surgery.C3AConfig(block_size_pattern={"a": 0})


def test_two_adapters_each_see_the_input_where_peft_feeds_the_second_what_the_first_gave(tmp_path: Path) -> None:
    """Its own merge of both is the sum that it does not run."""
    for name, case in (("a", "xavier"), ("b", "gaussian")):
        fields = CASES[case] | {"target_modules": ["q_proj"]}
        by_peft(made(), peft.C3AConfig(**fields), PART).save_pretrained(tmp_path / name)
    theirs = peft.PeftModel.from_pretrained(made(), tmp_path / "a").eval()
    theirs.load_adapter(tmp_path / "b", "b")
    theirs.base_model.set_adapter(["default", "b"])
    wrong = outputs(theirs)
    merged = outputs(theirs.merge_and_unload())
    ours = surgery.load(made(), tmp_path / "a")
    surgery.load(ours, tmp_path / "b", adapter_name="b")
    surgery.set_adapter(ours, ["default", "b"])
    assert near(outputs(ours), merged, torch.float32)
    assert apart(wrong, merged) > 1000 * apart(outputs(ours), merged)
    assert near(outputs(surgery.merge(ours)), merged, torch.float32)


def test_over_shira_and_under_lora_it_adds_to_what_they_make_also_under_autocast() -> None:
    model = surgery.inject(made(), surgery.ShiraConfig(r=4, target_modules=["q_proj"]), adapter_name="shira")
    surgery.inject(model, config("xavier"), adapter_name="c3a")
    surgery.inject(model, surgery.LoraConfig(r=2, target_modules=["q_proj"]), adapter_name="lora")
    surgery.set_adapter(model, ["shira", "c3a", "lora"])
    adapted = outputs(trained(model, 1 / 4))
    assert not near(adapted, outputs(made()), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert near(outputs(model), adapted, torch.bfloat16)
    assert near(outputs(surgery.merge(model)), adapted, torch.float32)
    assert torch.equal(outputs(surgery.eject(model)), outputs(made()))


def test_rows_of_a_batch_run_each_under_an_adapter_of_its_own() -> None:
    model, x = nn.Sequential(nn.Linear(32, 48)), torch.randn(5, 32)
    for name, block in (("a", 16), ("b", 2)):
        config = surgery.C3AConfig(block_size=block, target_modules=["0"], init_weights="gaussian")
        surgery.inject(model, config, adapter_name=name)
    names = ["a", "b", "__base__", "b", "a"]
    with surgery.mixed_batch(model, names):
        mixed = model(x)
    for row, name in enumerate(names):
        if name != "__base__":
            surgery.set_adapter(model, name)
        alone = model[0].base_layer(x[row]) if name == "__base__" else model(x[row])
        # Sums of 32 numbers in another order, and transforms of at most 4 passes.
        assert apart(mixed[row], alone) <= 2 * (32 + 3 * 4) * torch.finfo(torch.float32).eps * float(alone.abs().max())
    assert apart(mixed[0], model[0].base_layer(x[0])) > 1e-2 * float(mixed[0].abs().max())
