"""arithmetic "peft" and "peft-safe": the very bits of peft's own merges, on files and live."""

import copy
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import surgery

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SAFE = {"peft": False, "peft-safe": True}
FILE = "model.safetensors"
OPS: Mapping[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(70, 45),
    "conv1d": lambda: Conv1D(45, 70),
    "embedding": lambda: nn.Embedding(61, 33),
    "convolution": lambda: nn.Conv2d(6, 10, (3, 2), stride=2, padding=1),
    "point": lambda: nn.Conv2d(16, 24, 1),
    "convolution_1d": lambda: nn.Conv1d(6, 10, 3),
    "attention": lambda: nn.MultiheadAttention(32, 4),
}


class Case(NamedTuple):
    """The ops that one config of peft adapts at once."""

    config: Callable[..., peft.PeftConfig]
    ops: tuple[str, ...]


LORA = partial(peft.LoraConfig, r=4, lora_alpha=7, init_lora_weights=False)
IA3 = partial(peft.IA3Config, init_ia3_weights=False)
LINEAR = ("linear", "conv1d")
CASES = {
    "lora": Case(LORA, tuple(name for name in OPS if name != "attention")),
    "attention": Case(LORA, ("attention",)),
    "rslora": Case(partial(LORA, use_rslora=True, alpha_pattern={"linear": 3}), LINEAR),
    "lora_bias": Case(partial(LORA, lora_bias=True), (*LINEAR, "convolution")),
    "ia3": Case(partial(IA3, feedforward_modules=[]), (*LINEAR, "convolution")),
    "ia3 of inputs": Case(partial(IA3, feedforward_modules=[*LINEAR, "convolution"]), (*LINEAR, "convolution")),
    "adalora": Case(partial(peft.AdaLoraConfig, init_r=5, target_r=3, lora_alpha=7, total_step=9), LINEAR),
}
GIVEN = [
    (case, dtype, held) for case in CASES for dtype in DTYPES for held in DTYPES if case == "lora" or held == dtype
]
each_case = pytest.mark.parametrize("case", CASES)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_arithmetic = pytest.mark.parametrize("arithmetic", SAFE)


def base_of(case: str, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({name: OPS[name]() for name in CASES[case].ops}).to(dtype)


def adapted(case: str, model: nn.Module, autocast: bool = True, seed: int = 1) -> peft.PeftModel:
    """With a random adapter."""
    torch.manual_seed(seed)
    config = CASES[case].config(target_modules=list(CASES[case].ops))
    theirs = peft.get_peft_model(copy.deepcopy(model), config, autocast_adapter_dtype=autocast)
    with torch.no_grad():
        for name, values in theirs.named_parameters():
            if any(part in name for part in ("lora_", "ia3_")):
                values.copy_(torch.randn_like(values))
    return theirs


@pytest.fixture(scope="module")
def adapter_in(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, torch.dtype, int], Path]:
    """The folder of a case's adapter, one of two, its tensors in a dtype."""

    def folder(case: str, dtype: torch.dtype, number: int = 0) -> Path:
        place = tmp_path_factory.getbasetemp() / f"{case}-{number}-{dtype}"
        if not place.exists():
            adapted(case, base_of(case, torch.float32), seed=1 + number).save_pretrained(place)
            file = place / "adapter_model.safetensors"
            save_file({name: values.to(dtype) for name, values in load_file(file).items()}, file)
        return place

    return folder


def write(model: nn.Module, folder: Path) -> Path:
    folder.mkdir()
    save_file(model.state_dict(), folder / FILE)
    (folder / "config.json").write_text(json.dumps({"architectures": ["Model"]}))  # none that has a head
    return folder


def by_peft(model: nn.Module, adapters: list[Path], arithmetic: str) -> Mapping[str, Tensor]:
    """What peft makes of files."""
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), adapters[0], adapter_name="0")
    for number, adapter in enumerate(adapters[1:], 1):
        theirs.load_adapter(adapter, adapter_name=f"{number}")
    names = [str(number) for number in range(len(adapters))]
    return theirs.merge_and_unload(safe_merge=SAFE[arithmetic], adapter_names=names).state_dict()


def live(model: nn.Module, adapters: list[Path], arithmetic: str) -> nn.Module:
    for number, adapter in enumerate(adapters):
        surgery.load(model, adapter, adapter_name=f"{number}")
    surgery.set_adapter(model, [str(number) for number in range(len(adapters))])
    return surgery.merge(model, arithmetic=arithmetic)


def assert_same(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        assert found[name].dtype == values.dtype, name
        assert torch.equal(found[name], values), name


def check(case: str, dtype: torch.dtype, arithmetic: str, adapters: list[Path], tmp_path: Path) -> None:
    """Files, a live model and peft agree, and both merges come back to the bit."""
    model = base_of(case, dtype)
    wanted = by_peft(model, adapters, arithmetic)
    base, out = write(model, tmp_path / "base"), tmp_path / "out"
    surgery.merge_checkpoint(base, adapters, out, arithmetic=arithmetic, reversible=True)
    assert_same(load_file(out / FILE), wanted)
    surgery.unmerge_checkpoint(out, tmp_path / "back")
    assert (tmp_path / "back" / FILE).read_bytes() == (base / FILE).read_bytes()
    merged = live(base_of(case, dtype), adapters, arithmetic)
    assert_same(surgery.eject(copy.deepcopy(merged), keep_merged=True).state_dict(), wanted)
    assert_same(surgery.eject(surgery.unmerge(merged)).state_dict(), model.state_dict())


@each_arithmetic
@pytest.mark.parametrize(("case", "dtype", "held"), GIVEN, ids=str)
def test_a_merge_as_peft_has_its_bits_on_files_and_live_and_can_be_undone(
    case: str, dtype: torch.dtype, held: torch.dtype, arithmetic: str, adapter_in: Callable[..., Path], tmp_path: Path
) -> None:
    check(case, dtype, arithmetic, [adapter_in(case, held)], tmp_path)


@each_arithmetic
@each_dtype
@each_case
def test_two_adapters_merged_as_peft_have_its_bits(
    case: str, dtype: torch.dtype, arithmetic: str, adapter_in: Callable[..., Path], tmp_path: Path
) -> None:
    check(case, dtype, arithmetic, [adapter_in(case, torch.float32), adapter_in(case, dtype, 1)], tmp_path)


@each_arithmetic
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("case", ["lora", "ia3", "adalora"])
def test_live_adapters_held_in_a_half_type_are_merged_as_peft_merges_such(
    case: str, dtype: torch.dtype, arithmetic: str, tmp_path: Path
) -> None:
    model = base_of(case, dtype)
    theirs = adapted(case, model, autocast=False)
    theirs.save_pretrained(tmp_path)
    ours = surgery.load(base_of(case, dtype), tmp_path).to(dtype)
    found = surgery.eject(surgery.merge(ours, arithmetic=arithmetic), keep_merged=True).state_dict()
    assert_same(found, theirs.merge_and_unload(safe_merge=SAFE[arithmetic]).state_dict())
