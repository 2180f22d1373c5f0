"""MiSS to peft and from it: outputs, gradients, files, merges, the command line, and where peft is wrong."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from click.testing import CliRunner
from pairs import each_merge, judge_merge_of_peft, outputs, trained
from placed_pairs import (
    DTYPES,
    TARGETS,
    by_peft,
    check_fields,
    check_files,
    check_fresh,
    check_gradients,
    check_streaming,
    made,
    near,
)
from torch import nn

import surgery
from surgery.cli import surgery as command

PART = 1 / 4
CASES: dict[str, dict[str, Any]] = {
    "whole blocks": {"r": 8},
    "a shorter last block": {"r": 9},  # of 32 inputs 5 are left, of 48 3
    "one block": {"r": 32, "target_modules": ["q_proj"]},
    "mini": {"r": 8, "mini_r": 4, "init_weights": "mini"},
    "mini, a shorter last block": {"r": 7, "mini_r": 2, "init_weights": "mini"},
    "drawn": {"r": 8, "init_weights": False},
    "dropout": {"r": 8, "miss_dropout": 0.5},
    "biases": {"r": 8, "bias": "MiSS_only"},
    "all biases": {"r": 8, "bias": "all"},
    "output head": {"r": 8, "modules_to_save": ["lm_head"]},
}
each_case = pytest.mark.parametrize("case", CASES)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def config(case: str) -> peft.MissConfig:
    return peft.MissConfig(**{"target_modules": TARGETS} | copy.deepcopy(CASES[case]))


@each_dtype
@each_case
def test_what_peft_saves_gives_its_outputs_here_and_back_again(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    check_files(config(case), dtype, PART, tmp_path)


@each_case
def test_a_config_hits_the_same_modules_with_the_same_shapes_as_in_peft(case: str) -> None:
    check_fresh(config(case))


@each_case
def test_gradients_are_those_of_peft(case: str, tmp_path: Path) -> None:
    check_gradients(config(case), PART, tmp_path)


def test_every_field_that_peft_writes_is_read_and_written_again(tmp_path: Path) -> None:
    check_fields(peft.MissConfig(), surgery.MissConfig(), tmp_path)


@each_merge(["whole blocks", "a shorter last block", "mini", "all biases", "output head"], DTYPES)
def test_a_merge_by_peft_passes_verify_and_one_that_forgot_a_tensor_does_not(
    case: str, dtype: torch.dtype, safe: bool, tmp_path: Path
) -> None:
    model = made(dtype)
    judge_merge_of_peft(model, by_peft(model, config(case), PART), tmp_path, safe)


@each_dtype
@pytest.mark.parametrize("case", ["a shorter last block", "mini", "biases"])
def test_a_merge_of_files_is_the_live_one_and_both_come_back_to_the_bit(
    case: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    check_streaming(config(case), dtype, PART, tmp_path)


def test_the_command_line_merges_verifies_and_unmerges_at_half_the_strength(tmp_path: Path) -> None:
    def run(*given: object) -> str:
        done = CliRunner().invoke(command, [str(one) for one in given])
        assert done.exit_code == 0, done.output
        return done.output

    base, adapter, out, back = (tmp_path / one for one in ("base", "adapter", "out", "back"))
    made().save_pretrained(base)
    by_peft(made(), config("whole blocks"), PART).save_pretrained(adapter)
    assert "MiSS" in run("inspect", adapter)
    assert "MiSS" in run("plan", base, f"{adapter}=0.5")
    run("merge", base, f"{adapter}=0.5", out, "--reversible")
    run("verify", base, f"{adapter}=0.5", out)
    assert not surgery.verify_checkpoint(base, adapter, out).ok
    run("unmerge", out, back)
    assert (back / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()


def test_bat_is_refused_in_a_config_and_in_a_file_of_peft(tmp_path: Path) -> None:
    with pytest.raises(surgery.ConfigError, match=r"init_weights is 'bat'.* merge it in PEFT"):
        surgery.MissConfig(init_weights="bat")
    theirs = peft.get_peft_model(made(), peft.MissConfig(r=8, init_weights="bat", target_modules=["q_proj"]))
    theirs.save_pretrained(tmp_path)
    with pytest.raises(surgery.FormatError, match="init_weights is 'bat'"):
        surgery.load(made(), tmp_path)


def test_what_does_not_fit_a_layer_is_refused_and_nothing_changes() -> None:
    def refused(told: str, layer: nn.Module, **fields: Any) -> None:
        model = nn.Sequential(layer)
        with pytest.raises(surgery.MatchError, match=f"^0: .*{told}"):
            surgery.inject(model, surgery.MissConfig(target_modules=["0"], **fields))
        assert model[0] is layer

    refused("r is 64, and it has 6 inputs", nn.Linear(6, 8))
    refused("mini_r is 3, of which its 8 outputs are no multiple", nn.Linear(6, 8), r=2, mini_r=3, init_weights="mini")
    refused("its op is embedding; MiSS acts on Linear", nn.Embedding(6, 8), r=2)


@pytest.mark.parametrize(
    "field", [{"r": 0}, {"mini_r": 0}, {"miss_dropout": 1}, {"bias": "lora_only"}, {"init_weights": "x"}], ids=str
)
def test_a_value_that_cannot_be_is_refused_by_the_name_of_its_field(field: dict[str, Any]) -> None:
    with pytest.raises(surgery.ConfigError, match=f"^{next(iter(field))} is "):
        surgery.MissConfig(**field)


def test_a_second_adapter_keeps_its_own_form_where_peft_takes_that_of_the_first(tmp_path: Path) -> None:
    """peft runs the second one, a "mini", as if each output had a column of its own: it has no such columns."""
    for name, case in (("whole", "whole blocks"), ("mini", "mini")):
        by_peft(made(), config(case), PART).save_pretrained(tmp_path / name)
    theirs = peft.PeftModel.from_pretrained(made(), tmp_path / "whole")
    theirs.load_adapter(tmp_path / "mini", "mini")
    theirs.set_adapter("mini")
    with pytest.raises(RuntimeError, match="size"):
        outputs(theirs)
    alone = peft.PeftModel.from_pretrained(made(), tmp_path / "mini").eval()
    ours = surgery.load(made(), tmp_path / "whole")
    surgery.load(ours, tmp_path / "mini", adapter_name="mini")
    surgery.set_adapter(ours, "mini")
    assert near(outputs(ours), outputs(alone), torch.float32)


def test_over_lora_it_adds_to_what_lora_makes() -> None:
    model = trained(surgery.inject(made(), surgery.LoraConfig(r=2, target_modules=["q_proj"])), PART)
    surgery.inject(model, surgery.MissConfig(r=8, target_modules=["q_proj"]), adapter_name="miss")
    surgery.set_adapter(model, ["default", "miss"])
    trained(model, PART)
    adapted = outputs(model)
    assert not near(adapted, outputs(made()), torch.float32)
    assert near(outputs(surgery.merge(model)), adapted, torch.float32)
    assert torch.equal(outputs(surgery.eject(model)), outputs(made()))
