"""PiSSA, OLoRA and LoftQ: what peft trains by changing the base is trained here without, and files are plain LoRA."""

import inspect
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.utils import loftq_utils
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import surgery
from surgery.adapters.peft import PREFIX, TENSORS, read_adapter
from surgery.errors import ConfigError, MatchError
from surgery.procedures.live.refill import refill
from surgery.testing import assert_equivalent

EPS = torch.finfo(torch.float32).eps
STEPS, RATE = 3, 1e-2
FIELDS: dict[str, Any] = {
    "r": 2,
    "lora_alpha": 6,
    "target_modules": ["0", "2"],
    "rank_pattern": {"2": 3},
    "alpha_pattern": {"2": 5},
}
each_start = pytest.mark.parametrize("start", ["pissa", "pissa_niter_8", "olora"])
each_start_of_linear = pytest.mark.parametrize("start", ["pissa", "pissa_niter_8", "olora", "loftq"])


def made(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 8)).to(dtype)


def given(dtype: torch.dtype = torch.float32) -> Tensor:
    torch.manual_seed(2)
    return torch.randn(32, 16, dtype=dtype)


def trained(model: nn.Module) -> nn.Module:
    """Some steps of plain descent, which begin alike wherever the outputs and the factors are alike."""
    values = [one for one in model.parameters() if one.requires_grad]
    for _ in range(STEPS):
        model(given(next(model.parameters()).dtype)).square().mean().backward()
        with torch.no_grad():
            for one in values:
                one.sub_(RATE * one.grad)
                one.grad = None
    return model


def started(start: str, dtype: torch.dtype = torch.float32, **fields: Any) -> nn.Module:
    config = surgery.LoraConfig(**FIELDS | {"init_lora_weights": start} | fields)
    return surgery.inject(made(dtype), config)


@each_start_of_linear
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_start_changes_neither_the_base_nor_an_output(start: str, dtype: torch.dtype) -> None:
    model, before, base = started(start, dtype), made(dtype)(given(dtype)), made(dtype).state_dict()
    assert torch.equal(model(given(dtype)), before)
    learnt = {name for name, one in model.named_parameters() if one.requires_grad}
    assert learnt == {f"{layer}.lora_{factor}.default.weight" for layer in (0, 2) for factor in "AB"}
    surgery.unmerge(surgery.merge(trained(model)))
    assert not torch.equal(model(given(dtype)), before)
    back = surgery.eject(surgery.merge(model)).state_dict()
    assert back.keys() == base.keys()
    assert all(torch.equal(back[name], base[name]) for name in base)


@pytest.mark.parametrize("start", ["pissa", "olora"])
@pytest.mark.parametrize("stabilized", [False, True], ids=["", "rslora"])
def test_training_moves_the_factors_as_in_peft_which_takes_the_start_out_of_the_base(
    start: str, stabilized: bool, tmp_path: Path
) -> None:
    fields = FIELDS | {"use_rslora": stabilized} | ({"rank_pattern": {}, "alpha_pattern": {}} if stabilized else {})
    theirs = peft.get_peft_model(made(), peft.LoraConfig(**fields, init_lora_weights=start))
    ours = started(start, **fields)
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(tmp_path / "began")
    wanted, mine = dict(trained(theirs).named_parameters()), trained(ours)
    for name, values in mine.named_parameters():
        if values.requires_grad:
            # Each step's gradient is a chain of sums of at most 32 terms; the base there is rounded once more.
            atol = (STEPS + 1) * 32 * 16 * EPS * float(values.detach().abs().max())
            torch.testing.assert_close(values, wanted[f"base_model.model.{name}"], rtol=0.0, atol=atol)
    assert_equivalent(mine, theirs, given(), base=made())
    theirs.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "began"))
    assert_equivalent(surgery.load(made(), tmp_path / "converted"), theirs, given(), base=made())
    surgery.save(mine, tmp_path / "ours")
    told = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("ours", "converted")]
    for field in ("r", "lora_alpha", "use_rslora", "init_lora_weights"):
        assert told[0][field] == told[1][field]


@each_start_of_linear
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_files_are_an_ordinary_lora_for_peft_and_give_the_bytes_of_a_live_merge(
    start: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    ours, base = trained(started(start, dtype)), tmp_path / "base"
    surgery.save(ours, tmp_path / "adapter")
    told = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (told["init_lora_weights"], told["r"], told["lora_alpha"]) == (True, 4, 12)
    found = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {name.rpartition("model.")[2]: tuple(one.shape) for name, one in found.items()} == {
        "0.lora_A.weight": (4, 16),
        "0.lora_B.weight": (12, 4),
        "2.lora_A.weight": (6, 12),
        "2.lora_B.weight": (8, 6),
    }
    theirs = peft.PeftModel.from_pretrained(made(dtype), tmp_path / "adapter").eval()
    assert_equivalent(ours, theirs, given(dtype))
    base.mkdir()
    save_file(made(dtype).state_dict(), base / "model.safetensors")
    surgery.merge_checkpoint(base, tmp_path / "adapter", tmp_path / "out", reversible=True)
    surgery.verify_checkpoint(base, tmp_path / "adapter", tmp_path / "out").require()
    streamed = load_file(tmp_path / "out" / "model.safetensors")
    live = surgery.eject(surgery.merge(ours), keep_merged=True).state_dict()
    assert all(torch.equal(live[name], streamed[name]) for name in live)
    assert not torch.equal(live["0.weight"], made(dtype).state_dict()["0.weight"])
    surgery.unmerge_checkpoint(tmp_path / "out", tmp_path / "back")
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()


@each_start
@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (lambda: Conv1D(12, 16), lambda: torch.randn(64, 16)),
        (lambda: nn.Embedding(16, 12), lambda: torch.randint(0, 16, (64,))),
        (lambda: nn.Conv2d(6, 12, (2, 3), padding=1), lambda: torch.randn(8, 6, 5, 5)),
    ],
    ids=["Conv1D", "Embedding", "Conv2d"],
)
def test_other_layers_start_so_too_though_not_in_peft(start: str, layer: Any, x: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(layer()), x()
    before = model(x).detach()
    base = nn.Sequential(layer())
    base.load_state_dict(model.state_dict())
    ours = surgery.inject(model, surgery.LoraConfig(r=2, target_modules=["0"], init_lora_weights=start))
    assert torch.equal(ours(x), before)
    for one in ours.parameters():
        one.data.add_(torch.randn_like(one) / 4 if one.requires_grad else 0)
    surgery.save(ours, tmp_path)
    assert_equivalent(ours, surgery.load(base, tmp_path), x)
    assert not torch.equal(ours(x), before)


def test_dropout_acts_on_what_is_trained_and_not_on_the_start() -> None:
    ours = started("pissa", lora_dropout=0.5).train()
    layer, x = ours[0], torch.randn(4, 16)
    apart = layer.base_layer(x)
    began = 3 * (x @ layer.lora_A0.default.weight.T @ layer.lora_B0.default.weight.T)
    with torch.no_grad():
        layer.lora_B.default.weight.zero_()
    torch.testing.assert_close(layer(x), apart - began, rtol=0.0, atol=8 * 16 * EPS * float(apart.detach().abs().max()))


def test_adapters_switch_and_are_deleted_and_frozen_as_others() -> None:
    ours = started("pissa")
    surgery.inject(ours, surgery.LoraConfig(r=2, target_modules=["0"]), adapter_name="b")
    surgery.set_adapter(ours, ["default", "b"])
    with surgery.mixed_batch(ours, ["default", "b", "__base__", "default"]):
        assert torch.equal(ours(given()[:4]), made()(given()[:4]))
    surgery.merge(ours)
    assert torch.equal(ours[0].base_layer.weight, made()[0].weight)  # of a start, nothing is left to the bit
    surgery.unmerge(ours)


@each_start
@pytest.mark.parametrize("aware", [None, "nf4"], ids=["", "aware"])
def test_a_quantized_base_keeps_its_bytes_and_its_outputs_at_the_start(
    start: str, aware: str | None, tmp_path: Path
) -> None:
    model = surgery.quantize(nn.Sequential(nn.Linear(64, 64)), "nf4")
    x, held = torch.randn(4, 64), model.state_dict()["0.weight"].clone()
    before = model(x).detach()
    config = surgery.LoraConfig(r=2, target_modules=["0"], init_lora_weights=start)
    ours = surgery.inject(model, config, quantization_aware=aware)
    with torch.no_grad():
        assert_equivalent(lambda _given: before, ours, x)
        for one in ours.parameters():
            if one.requires_grad:
                one.add_(torch.randn_like(one) / 4)
    after = ours(x).detach()
    surgery.save(ours, tmp_path)
    surgery.eject(ours)
    assert torch.equal(model.state_dict()["0.weight"], held)
    assert not torch.allclose(after, before)
    if aware is None:
        assert_equivalent(surgery.load(model, tmp_path), lambda _given: after, x)


@each_start_of_linear
def test_what_was_saved_is_laid_into_a_model_that_starts_anew_and_trained_on_to_the_same_bits(
    start: str, tmp_path: Path
) -> None:
    whole = trained(started(start))
    surgery.save(whole, tmp_path)
    model = started(start)
    refill(model, read_adapter(tmp_path), "default")
    held, wanted = model.state_dict(), whole.state_dict()
    assert all(torch.equal(held[name], wanted[name]) for name in wanted)
    held, again = (trained(one).state_dict() for one in (model, whole))
    assert all(torch.equal(held[name], again[name]) for name in again)
    saved = load_file(tmp_path / TENSORS)[f"{PREFIX}0.lora_A.weight"]
    assert not torch.equal(again["0.lora_A.default.weight"], saved[:2])
    other = started(start, alpha_pattern={})
    with pytest.raises(surgery.MatchError, match="the same tensors are wanted"):
        refill(other, read_adapter(tmp_path), "default")


@pytest.mark.parametrize(
    ("fields", "error", "said"),
    [
        ({"r": 9, "rank_pattern": {}, "alpha_pattern": {}}, ConfigError, "2: r is 9, .* takes at most 8 parts"),
        ({"lora_alpha": -1}, ConfigError, "0: its scaling is -0.5, .* a lora_alpha above 0"),
        ({"use_dora": True}, ConfigError, "goes without use_dora"),
        ({"lora_bias": True}, ConfigError, "init_lora_weights True or False"),
        ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 2}}, ConfigError, "one of 4, 8 is wanted"),
        ({"init_lora_weights": "loftq", "loftq_config": {"loftq_iter": 0}}, ConfigError, "loftq_iter is 0"),
        ({"init_lora_weights": "loftq", "lora_alpha": 0}, ConfigError, "0: its scaling is 0.0, .* above 0"),
        ({"loftq_config": {"loftq_bits": 4}}, ConfigError, "init_lora_weights is not 'loftq'"),
        ({"init_lora_weights": "mica"}, ConfigError, "trains A alone"),
        ({"init_lora_weights": "pissa_niter_"}, ConfigError, "'lora_ga' and 'loftq' are supported"),
    ],
    ids=str,
)
def test_what_cannot_start_so_is_refused_by_name_and_nothing_changes(
    fields: dict[str, Any], error: type[Exception], said: str
) -> None:
    model = made()
    with pytest.raises(error, match=said):
        surgery.inject(model, surgery.LoraConfig(**FIELDS | {"init_lora_weights": "pissa"} | fields))
    assert [type(one) for one in model] == [nn.Linear, nn.Tanh, nn.Linear]


def test_a_convolution_in_groups_is_refused() -> None:
    grouped = nn.Sequential(nn.Conv1d(4, 4, 1, groups=2))
    with pytest.raises(MatchError, match="0: init_lora_weights is 'olora', which is of one matrix"):
        surgery.inject(grouped, surgery.LoraConfig(r=2, target_modules=["0"], init_lora_weights="olora"))


@pytest.mark.parametrize(("bits", "rounds"), [(4, 1), (4, 3), (8, 1), (8, 3)], ids=str)
def test_loftq_begins_with_what_peft_finds_that_a_format_loses(bits: int, rounds: int) -> None:
    there = vars(loftq_utils) | {}
    exec(inspect.getsource(loftq_utils.loftq_init).replace('"cuda"', '"cpu"'), there)  # peft's own asks for a GPU
    torch.manual_seed(0)
    layer = nn.Linear(64, 48)
    _, A, B = there["loftq_init"](layer.weight.detach().clone(), bits, 2, rounds)
    settings = {"loftq_bits": bits, "loftq_iter": rounds}
    config = surgery.LoraConfig(r=2, target_modules=["0"], init_lora_weights="loftq", loftq_config=settings)
    for alpha in (2, 8):  # scalings of 1 and 4: to divide by the root of these rounds nothing
        ours = surgery.inject(nn.Sequential(layer), replace(config, lora_alpha=alpha))[0]
        found = alpha / 2 * (ours.lora_B.default.weight @ ours.lora_A.default.weight).detach()
        assert torch.equal(found, B @ A)


def test_loftq_has_nothing_to_begin_with_where_weights_are_quantized_and_is_of_linear_layers() -> None:
    config = surgery.LoraConfig(r=2, target_modules=["0"], init_lora_weights="loftq")
    quantized = surgery.quantize(nn.Sequential(nn.Linear(64, 64)), "nf4")
    with pytest.raises(surgery.StateError, match="0: its weight is quantized, and the start is of what nf4 would lose"):
        surgery.inject(quantized, config)
    flat = nn.Sequential(nn.Linear(64, 64))
    nn.init.constant_(flat[0].weight, 0.5)
    with pytest.raises(surgery.StateError, match="0: nf4 holds its weight as it is"):
        surgery.inject(flat, config)
    with pytest.raises(MatchError, match="0: its op is embedding; init_lora_weights 'loftq' is for Linear and Conv1D"):
        surgery.inject(nn.Sequential(nn.Embedding(64, 64)), config)


def test_a_file_of_loftq_is_refused_since_no_conversion_holds_it(tmp_path: Path) -> None:
    theirs = peft.get_peft_model(made(), peft.LoraConfig(**FIELDS))
    theirs.save_pretrained(tmp_path)
    told = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(told | {"init_lora_weights": "loftq"}))
    with pytest.raises(surgery.FormatError, match=r"'loftq', by which PEFT changes the base .* merge it in PEFT"):
        surgery.load(made(), tmp_path)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_file_that_would_change_the_base_again_is_refused_and_the_conversion_named(
    start: str, tmp_path: Path
) -> None:
    peft.get_peft_model(made(), peft.LoraConfig(**FIELDS, init_lora_weights=start)).save_pretrained(tmp_path)
    said = f"init_lora_weights is '{start}', by which PEFT changes the base .* path_initial_model_for_weight_conversion"
    with pytest.raises(surgery.FormatError, match=said):
        surgery.load(made(), tmp_path)
    again = surgery.inject(made(), surgery.LoraConfig.from_pretrained(tmp_path))  # the config alone is one to train by
    assert torch.equal(again(given()), made()(given()))


def test_what_was_trained_from_mica_is_an_ordinary_lora_as_the_refusal_says(tmp_path: Path) -> None:
    theirs = peft.get_peft_model(made(), peft.LoraConfig(**FIELDS, init_lora_weights="mica")).eval()
    for name, values in theirs.named_parameters():
        if "lora_" in name:
            values.data.add_(torch.randn_like(values) / 4)
    theirs.save_pretrained(tmp_path)
    with pytest.raises(surgery.FormatError, match="in its config this may be set to true"):
        surgery.load(made(), tmp_path)
    config = tmp_path / "adapter_config.json"
    told = json.loads(config.read_text())
    config.write_text(json.dumps(told | {"init_lora_weights": True}))
    assert_equivalent(surgery.load(made(), tmp_path), theirs, given(), base=made())
