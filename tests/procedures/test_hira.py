"""HiRA among other adapters: it adds to the base, whatever lies between; merged, undone and verified to the bit."""

import itertools
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_folders import file_hashes, read_tensors, tensor_hashes, write_base
from torch import Tensor, nn

import surgery
from surgery import HiraConfig, IA3Config, LoraConfig, MatchError, OFTConfig
from surgery.core.arithmetic import Plain
from surgery.core.elementwise import Affine, Elementwise, Growth, Scale, Shift, chained, grounded
from surgery.core.layered import layered
from surgery.core.method import Dense
from surgery.methods.hira import Hira

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CONFIGS = {
    "hira": HiraConfig(r=2, target_modules=["up", "down"], init_weights=False),
    "other": HiraConfig(r=3, target_modules=["up"], init_weights=False),
    "lora": LoraConfig(r=2, target_modules=["up", "down"], init_lora_weights=False),
    "dora": LoraConfig(r=2, target_modules=["up", "down"], init_lora_weights=False, use_dora=True),
    "oft": OFTConfig(oft_block_size=2, target_modules=["up"], init_weights=False),
    "ia3": IA3Config(target_modules=["up", "down"], feedforward_modules=["down"], init_ia3_weights=False),
}
ORDERS = [
    ("hira", "other"),
    ("hira", "lora", "ia3"),
    ("lora", "hira"),
    ("ia3", "other", "hira"),
    ("dora", "lora", "hira"),
]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x))


def adapter(folder: Path, name: str) -> Path:
    surgery.save(surgery.inject(Net(), CONFIGS[name]), folder / name)
    (folder / name / "surgery.base.json").unlink()
    return folder / name


def loaded(dtype: torch.dtype, paths: list[Path]) -> nn.Module:
    model = Net().to(dtype)
    for path in paths:
        surgery.load(model, path, adapter_name=path.name)
    surgery.set_adapter(model, [path.name for path in paths])
    return model


@each_dtype
@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_adapters_in_any_order_are_merged_live_and_on_files_to_the_same_bits_and_come_back(
    order: tuple[str, ...], dtype: torch.dtype, tmp_path: Path
) -> None:
    base = write_base(tmp_path / "base", Net().to(dtype).state_dict())
    paths = [adapter(tmp_path, name) for name in order]
    surgery.merge_checkpoint(base, paths, tmp_path / "out", reversible=True)
    model, x = loaded(dtype, paths), torch.linspace(-1, 1, 24).view(4, 6).to(dtype)
    with torch.no_grad():
        out, effective = model(x), model.up.weight.clone()
    surgery.merge(model)
    size = float(model(x).detach().abs().max()) + float(out.abs().max())
    # Sums of 10 terms and fewer, of two layers, with three adapters of some eight roundings each.
    assert float((model(x).detach() - out).abs().max()) <= 2 * (10 + 3 * 8) * torch.finfo(dtype).eps * max(size, 8)
    merged = surgery.eject(model, keep_merged=True).state_dict()
    # Of the outcome, which is rounded once, and of what three adapters of size 8 round in float32.
    room = torch.finfo(dtype).eps * effective.abs() + 3 * 64 * torch.finfo(torch.float32).eps
    assert bool(((merged["up.weight"] - effective).abs() <= room).all())
    assert tensor_hashes(read_tensors(tmp_path / "out")) == tensor_hashes(merged)
    report = surgery.verify_checkpoint(base, paths, tmp_path / "out")
    assert report.ok
    assert report.counts["rounding"] == 0
    surgery.unmerge_checkpoint(tmp_path / "out", tmp_path / "back")
    assert file_hashes(tmp_path / "back") == file_hashes(base)


@pytest.mark.parametrize("order", [("lora", "hira"), ("hira", "lora"), ("hira", "other"), ("ia3", "hira", "other")])
def test_each_hira_adds_to_the_base_and_not_to_what_others_have_made(order: tuple[str, ...], tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", Net().double().state_dict())
    paths = [adapter(tmp_path, name) for name in order]
    surgery.merge_checkpoint(base, paths, tmp_path / "out")
    W0 = read_tensors(base)["up.weight"]
    wanted = W0.clone()
    for name, path in zip(order, paths, strict=True):
        p = {role: values.double() for role, values in _tensors(path).items()}
        wanted = (
            wanted * p["l"] if name == "ia3" else wanted + (W0 if name in {"hira", "other"} else 4) * (p["B"] @ p["A"])
        )  # LoRA's alpha / r is 4
    found, r = read_tensors(tmp_path / "out")["up.weight"], 3
    # The grid of the factors: some r * 2^-21 of the products of their largest, which are below 5 each.
    assert float((found - wanted).abs().max()) <= len(order) * 4 * r * 2.0**-21 * 5 * 5


def _tensors(path: Path) -> dict[str, Tensor]:
    return dict(surgery.load(Net().double(), path).up.fitted["default"].params)


def test_one_alone_that_takes_all_of_a_weight_away_comes_back() -> None:
    model = surgery.inject(Net(), HiraConfig(r=1, target_modules=["up"]))
    with torch.no_grad():
        p = model.up.fitted["default"].params
        p["B"].fill_(1.0)
        p["A"].copy_(torch.tensor([[-1.0, -2.0, 0.0, 1.0, -0.5, 2.0**-30]]))
    before = tensor_hashes(model.state_dict())
    surgery.merge(model)
    assert not bool(model.up.base_layer.weight[:, 0].any())
    surgery.unmerge(model)
    assert tensor_hashes(model.state_dict()) == before


@pytest.mark.parametrize("order", [["a", "b"], ["b", "a"]])
def test_one_aware_of_a_format_over_others_runs_as_their_merge_held_in_it(order: list[str]) -> None:
    def made(aware: str | None) -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(128, 64))
        hira, lora = (CONFIGS[name].named(["0"]) for name in ("hira", "lora"))
        surgery.inject(model, hira, adapter_name="a", quantization_aware=aware)
        surgery.inject(model, lora, adapter_name="b", quantization_aware=aware)
        surgery.set_adapter(model, order)
        return model

    aware, plain = made("int8"), made(None)
    surgery.eject(surgery.merge(plain), keep_merged=True)
    surgery.quantize(plain, "int8")
    assert torch.equal(aware[0].weight.detach(), surgery.inject(plain, CONFIGS["lora"].named(["0"]))[0]._stored())


@each_dtype
def test_steps_that_grow_by_the_base_are_chained_as_the_sum_says(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    kinds: list[Elementwise] = [
        Growth(torch.randn(4, 5).double()),
        Shift(torch.randn(4, 5).double()),
        Scale(torch.randn(4, 5).double().mul_(torch.rand(4, 5) > 0.3)),  # some are zero
        Affine(torch.randn(4, 5).double(), torch.randn(4, 5).double()),
    ]
    w = torch.randn(4, 5).to(dtype).double()
    for steps in itertools.product(kinds, repeat=3):
        made, told = w, w
        for step in chained(steps):
            made = step.apply(made)
        for step in grounded(steps, w):
            told = step.apply(told)
        wanted = [_by_hand(steps, at, float(w.view(-1)[at])) for at in range(w.numel())]
        sizes = torch.tensor([size for _, size in wanted], dtype=torch.float64)
        exact = torch.tensor([float(value) for value, _ in wanted], dtype=torch.float64)
        # Of three steps with three roundings each, of what passes through them by magnitude.
        for found in (made, told):
            assert bool(((found.view(-1) - exact).abs() <= 9 * torch.finfo(torch.float64).eps * sizes).all())


def _by_hand(steps: tuple[Elementwise, ...], at: int, w: float) -> tuple[Fraction, float]:
    value, size = Fraction(w), abs(w)
    for step in steps:
        v = Fraction(float(step.values.view(-1)[at]))
        added = Fraction(float(step.added.view(-1)[at])) if isinstance(step, Affine) else Fraction()
        if isinstance(step, Growth):
            value, size = value + Fraction(w) * v, size + abs(w) * (1 + abs(float(v)))
        elif isinstance(step, Shift):
            value, size = value + v, size + abs(float(v))
        else:
            value, size = value * v + added, size * abs(float(v)) + abs(float(added))
    return value, size + 1e-300


def test_over_a_method_that_is_not_elementwise_it_is_refused_by_name() -> None:
    class Rows(Hira):
        name = "Rows"
        of_base = False

        def steps(self, *_: object) -> None:  # type: ignore[override]
            return None

        def merge(self, base: Dense, *_: object) -> Dense:
            return base

    op = surgery.inject(Net(), CONFIGS["hira"]).up
    p = op.fitted["default"].params
    layers = [(Rows(2), p), (Hira(2), p)]
    with pytest.raises(MatchError, match="HiRA adds to the base, over Rows"):
        layered(op.dense(), layers, op.site, lambda B, A, _, scaling: scaling * (B @ A))

    layered(op.dense(), layers[::-1], op.site, lambda B, A, _, scaling: scaling * (B @ A))


@pytest.mark.parametrize("names", [("hira", "lora"), ("lora", "hira"), ("lora", "ia3", "hira", "other")], ids=str)
def test_each_product_is_made_once(names: tuple[str, ...]) -> None:
    made: list[Tensor] = []

    class Counted(Plain):
        def __call__(self, *given: Any, **told: Any) -> Tensor:
            made.append(given[0])
            return super().__call__(*given, **told)

    model = Net()
    for name in names:
        surgery.inject(model, CONFIGS[name], adapter_name=name)
    up = model.up
    layers = [(fitted.method, fitted.method.matrices(fitted.params, up.site)) for fitted in map(up.fitted.get, names)]
    layered(up.dense(), layers, up.site, Counted())
    assert len(made) == sum(name != "ia3" for name in names)


def test_over_a_rotation_it_is_refused_before_anything_is_merged_and_below_one_it_comes_back(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", {f"{name}": one.detach() for name, one in Net().named_parameters()})
    first, second = (adapter(tmp_path, name) for name in ("oft", "other"))
    assert [str(one) for one in surgery.plan(base, [first, second]).refusals] == [
        "up.weight: HiRA adds to the base, over OFT, and not every method here is merged element by element; give HiRA "
        "first, or merge them apart"
    ]
    beside = surgery.plan(base, [adapter(tmp_path, "lora"), first, second]).refusals
    assert ["HiRA adds to the base, over LoRA, OFT, and" in str(one) for one in beside] == [True]
    with pytest.raises(MatchError, match="HiRA adds to the base, over OFT"):
        surgery.merge_checkpoint(base, [first, second], tmp_path / "out")
    with pytest.raises(MatchError, match="HiRA adds to the base, over OFT"):
        surgery.merge(loaded(torch.float32, [first, second]))
    surgery.merge_checkpoint(base, [second, first], tmp_path / "out", reversible=True)
    assert surgery.verify_checkpoint(base, [second, first], tmp_path / "out").counts["different"] == 0
    surgery.unmerge_checkpoint(tmp_path / "out", tmp_path / "back")
    assert file_hashes(tmp_path / "back") == file_hashes(base)


def test_a_plain_merge_of_it_below_a_rotation_is_judged_by_what_both_leave_open(tmp_path: Path) -> None:
    """Its product all but cancels, so that what float32 rounds in it is far more than an ulp of what is left."""
    torch.manual_seed(5)
    w = torch.randn(8, 8)
    base = write_base(tmp_path / "base", {"up.weight": w})
    paths = []
    for name, config in {
        "hira": HiraConfig(r=64, target_modules=["up"], init_weights=False),
        "oft": OFTConfig(oft_block_size=2, target_modules=["up"]),
    }.items():
        model = surgery.inject(nn.ModuleDict({"up": nn.Linear(8, 8, bias=False)}), config)
        if name == "hira":
            with torch.no_grad():
                half = torch.randn(8, 32) * 300
                model["up"].hira_B["default"].copy_(torch.cat([half, -half], 1))
                A = model["up"].hira_A["default"]
                A[32:] = A[:32] * (1 + torch.randn(32, 8) / 10**5)
                grown = torch.stack([B @ A for B in model["up"].hira_B["default"]])  # [out, in], plainly
        surgery.save(model, tmp_path / name)
        (tmp_path / name / "surgery.base.json").unlink()
        paths.append(tmp_path / name)
    merged = write_base(tmp_path / "out", {"up.weight": w + w * grown})
    report = surgery.verify_checkpoint(base, paths, merged)
    assert {one.grade for one in report.tensors.values()} == {"rounding"}
    wrong = write_base(tmp_path / "wrong", {"up.weight": (w + w * grown) * 1.1})
    assert not surgery.verify_checkpoint(base, paths, wrong).ok
