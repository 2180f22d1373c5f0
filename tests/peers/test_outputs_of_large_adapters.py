"""verify --outputs of adapters that dwarf their base, and of large ranks: a right merge agrees, a wrong one fails."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_verify_outputs import MODELS, changed, made, merged
from test_verify_outputs import verified as verified_on
from torch import Tensor

import surgery
from surgery.core import arithmetic
from surgery.core.arithmetic import BLOCK, exact_product, float_product
from surgery.core.op import WHOLE
from surgery.core.rounding import round_once
from surgery.integrations.transformers import outputs
from surgery.methods.lora import Lora
from surgery.procedures.checking import exactly
from surgery.procedures.checking.exactly import held_product, held_rounding

ALL = {"target_modules": "all-linear"}
STACKS = ALL | {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
LARGE = {
    "stacks": ("MixtralForCausalLM", STACKS | {"lora_alpha": 256}, 2),
    "LoRA": ("LlamaForCausalLM", ALL | {"lora_alpha": 256}, 0),
    "DoRA": ("LlamaForCausalLM", ALL | {"lora_alpha": 256, "use_dora": True}, 0),
}
TOKENS = {"input_ids": torch.arange(60).reshape(3, 20)}
KINDS = pytest.mark.parametrize("kind", LARGE)


def verified(folder: Path, **options: Any) -> surgery.VerifyReport:
    """On inputs that stay the same, for how much a model makes of an error depends on them."""
    return verified_on(folder, inputs=TOKENS, **options)


def dwarfed(folder: Path, name: str, fields: dict[str, Any], seed: int) -> Path:
    """A merge of an adapter that dwarfs its base; a DoRA's magnitudes are no longer those that it began with."""
    made(name, folder, seed=seed, **fields)
    path = folder / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    for number, (key, values) in enumerate(sorted(tensors.items())):
        if "magnitude" in key:
            drawn = torch.rand(values.shape, generator=torch.Generator().manual_seed(number))
            tensors[key] = values * (drawn + 0.5)
    save_file(tensors, path)
    return merged(folder)


def plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if an exact merge were an ideal one."""
    monkeypatch.setattr(exactly, "held_product", float_product)
    monkeypatch.setattr(exactly, "held_rounding", lambda values, _: values)


@KINDS
def test_a_right_merge_of_an_adapter_that_dwarfs_its_base_agrees(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = dwarfed(tmp_path, *LARGE[kind])
    report = verified(folder, layers=True)
    assert report.ok, report.outputs.table()
    plainly(monkeypatch)
    assert "4 floors" in verified(folder).outputs.why


@pytest.mark.parametrize("name", MODELS)
def test_what_is_known_of_an_exact_merge_is_all_that_parts_it_from_what_is_ideal(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for float64's own noise, 2^-29 of float32's."""
    folder = merged(made(name, tmp_path))
    monkeypatch.setattr(outputs, "_FACTOR", 2.0**-20)
    report = verified_on(folder, layers=True)
    assert report.outputs.ok, report.outputs.table()
    plainly(monkeypatch)
    assert not verified_on(folder).outputs.ok


def off(merged: Tensor, ulps: int) -> Tensor:
    """The largest element is off by so many: 2^13 are 2^-10 to 2^-11 of it."""
    flat = merged.flatten().clone()
    flat.view(torch.int32)[flat.abs().argmax()] += ulps
    return flat.view(merged.shape)


WRONG = {
    "left out": lambda _, base: base,
    "half": lambda merged, base: base + (merged - base) / 2,
    "8192nd less": lambda merged, base: base + (merged - base) * (1 - 2.0**-13),
    "1024th more in one element": lambda merged, _: off(merged, 8192),
}


@KINDS
@pytest.mark.parametrize("wrong", WRONG)
def test_one_that_is_wrong_at_one_site_does_not(wrong: str, kind: str, tmp_path: Path) -> None:
    folder = changed(dwarfed(tmp_path, *LARGE[kind]), WRONG[wrong])
    report = verified(folder, layers=True).outputs
    assert not report.ok
    names = [one.name for one in report.outputs if not one.ok]
    assert not any("layers.0" in name for name in names)
    assert "logits" in names or "one element" in wrong


@pytest.mark.parametrize("by", [1 - 2.0**-10, -1], ids=["weaker", "turned"])
def test_a_formula_that_is_wrong_in_merge_and_derivation_alike_does_not_agree(
    by: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layers of a Llama run by activations, which know nothing of deltas."""
    right = Lora.delta
    monkeypatch.setattr(Lora, "delta", lambda *given: right(*given) * by)
    report = verified(dwarfed(tmp_path, *LARGE["LoRA"]))
    assert report.counts["bits"] > 0
    assert report.counts["different"] == 0
    assert not report.outputs.ok


@pytest.mark.parametrize("use_dora", [False, True], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("r", [256, 512, 600])
def test_a_merge_of_a_large_rank_agrees_and_without_its_last_rows_does_not(
    r: int, use_dora: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for scaling in (1, 64):
        folder = tmp_path / str(scaling)
        assert verified(
            dwarfed(folder, "LlamaForCausalLM", ALL | {"r": r, "lora_alpha": scaling * r, "use_dora": use_dora}, 0)
        ).ok
    right = arithmetic._sum
    last = BLOCK if r > BLOCK else r - 1  # of 600, the block that is added last
    monkeypatch.setattr(arithmetic, "_sum", lambda B, A: right(B[:, :last], A[:last]))
    for scaling in (1, 64):
        (tmp_path / str(scaling) / "out").rename(tmp_path / str(scaling) / "right")
        assert not verified(merged(tmp_path / str(scaling))).outputs.ok


def factors(r: int, stack: tuple[int, ...] = (), dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    drawn = torch.Generator().manual_seed(r)
    B, A = (torch.randn(*stack, *shape, generator=drawn).to(dtype) for shape in ((20, r), (r, 30)))
    return B * 10 ** torch.randn(20, 1, generator=drawn).to(dtype), A


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stack", [(), (3,)], ids=["matrix", "stack"])
@pytest.mark.parametrize("r", [1, 8, 600])
def test_a_held_product_is_the_exact_one(r: int, stack: tuple[int, ...], dtype: torch.dtype) -> None:
    B, A = factors(r, stack, dtype)
    for tile in (WHOLE, (slice(3, 9), slice(5, 30))):
        assert torch.equal(held_product(B, A, tile, 0.3), exact_product(B, A, tile, 0.3))


def test_a_product_that_is_wrong_moves_nothing_by_more_than_the_grid_explains(monkeypatch: pytest.MonkeyPatch) -> None:
    B, A = factors(600)
    ideal = 0.3 * (B.double() @ A.double())
    monkeypatch.setattr(exactly, "exact_product", lambda B, A, *_, **__: 2 * (B.double() @ A.double()))
    apart = (held_product(B, A, WHOLE, 0.3) - ideal).abs()
    most = 0.3 * 600 * 2.0**-21 * B.double().abs().amax(1, keepdim=True) * A.double().abs().amax(0)
    # Either sum of r terms may be off by r * 2^-53 of their sizes, each of which is 2^21 / r of `most` at the most.
    assert (apart <= most * (1 + 2 * 600 * 2.0**-32)).all()
    assert apart.max() > 0


def test_a_rounding_that_is_wrong_moves_nothing_by_more_than_half_an_ulp(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(held_rounding(values, torch.bfloat16), round_once(values, torch.bfloat16).double())
    monkeypatch.setattr(exactly, "round_once", lambda values, _: 2 * values)
    most = 2.0**-8 + 2.0**-53  # the sum with half an ulp is rounded itself
    assert ((held_rounding(values, torch.bfloat16) - values).abs() <= most * values.abs()).all()
