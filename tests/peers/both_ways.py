"""Both ways: what is asked of an adapter of peft's here, and of ours there, whatever the method and the model."""

import copy
import json
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import surgery
from surgery.cli import main

Outputs = Callable[[nn.Module], Tensor]
FILE = "adapter_model.safetensors"


def close(one: Tensor, other: Tensor, terms: int = 64) -> bool:
    """Sums of so many terms or fewer in each of a few layers, in whatever order, with what they are scaled by."""
    return bool((one - other).abs().max() <= terms * torch.finfo(one.dtype).eps * max(1, float(other.abs().max())))


def files_go_both_ways(model: nn.Module, theirs: nn.Module, outputs: Outputs, folder: Path) -> nn.Module:
    """Ours, of peft's file: equal outputs here, and there again; the same tensors, to the bit, and fields."""
    before, wanted = outputs(model), outputs(theirs)
    theirs.save_pretrained(folder / "theirs")
    ours = surgery.load(copy.deepcopy(model), folder / "theirs")
    assert close(outputs(ours), wanted)
    assert not close(before, wanted)
    surgery.save(ours, folder / "ours")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(model), folder / "ours").eval()
    assert torch.equal(outputs(again), wanted)
    found, given = (load_file(folder / one / FILE) for one in ("ours", "theirs"))
    assert found.keys() == {
        name for name in given if not name.endswith("base_layer.weight")
    }  # copies of the base's own
    assert all(torch.equal(values, given[name]) for name, values in found.items())
    configs = [json.loads((folder / one / "adapter_config.json").read_text()) for one in ("ours", "theirs")]
    assert configs[0].keys() == configs[1].keys()
    apart = {name for name in configs[0] if configs[0][name] != configs[1][name]}
    assert apart <= {"auto_mapping", "base_model_name_or_path", "fan_in_fan_out", "target_modules"}
    return ours


def gradients_agree(theirs: nn.Module, ours: nn.Module, outputs: Outputs, terms: int = 64) -> None:
    """In every tensor that either trains, within so many roundings of the largest."""
    found: list[dict[str, Tensor]] = []
    for one in (theirs, ours):
        one.zero_grad()
        outputs(one).square().sum().backward()
        held = {name.removeprefix("base_model.model."): values.grad for name, values in one.named_parameters()}
        found.append({name: values for name, values in held.items() if values is not None})
    assert found[0].keys() == found[1].keys()
    for name, wanted in found[0].items():
        assert bool(wanted.any())
        room = terms * torch.finfo(wanted.dtype).eps * float(wanted.abs().max())
        assert float((found[1][name] - wanted).abs().max()) <= 8 * room  # of the layers above too


def command_line_merges_and_takes_back(base: Path, adapter: Path, folder: Path) -> None:
    """inspect, plan, merge, verify and unmerge, each once."""
    out, back = folder / "by command", folder / "back by command"
    for command in (
        ["inspect", adapter],
        ["plan", base, adapter],
        ["merge", base, adapter, out, "--reversible"],
        ["verify", base, adapter, out],
        ["unmerge", out, back],
    ):
        with pytest.raises(SystemExit) as stopped:
            main([str(one) for one in command])
        assert not stopped.value.code, command
    for name in ("model.safetensors", "config.json"):
        assert (back / name).read_bytes() == (base / name).read_bytes()
