"""inspect of an adapter: what it computes, by which numbers, over what, and of which base."""

from copy import deepcopy
from pathlib import Path

import pytest
from checkpoint_folders import llama_base, write_adapter
from outcomes import Run, parsed
from torch import nn

import surgery


def test_inspect_says_what_an_adapter_is(run: Run, adapter: Path, tmp_path: Path) -> None:
    assert run("inspect", adapter).out.splitlines()[-1] == (
        "adapter: LoRA; r 4; lora_alpha 6; target_modules q_proj, up_proj; 8 tensors, 896 bytes"
    )
    assert parsed(run("inspect", adapter, "--json"))["adapter"] == {
        "method": ["LoRA"],
        "r": [4],
        "lora_alpha": [6],
        "alpha": [],
        "target_modules": ["q_proj", "up_proj"],
        "base_model_name_or_path": None,
    }
    fields: dict[str, object] = {"base_model_name_or_path": "me/b\x1base", "alpha_pattern": {"up_proj": 2.5}}
    other = write_adapter(tmp_path / "other", target_modules=r".*\._?\w+_proj", **fields)
    found = surgery.inspect(other)
    assert str(found) == (
        "adapter: LoRA; r 4; lora_alpha 2.5 to 6; target_modules '.*\\._?\\w+_proj'; base me/b\\x1base; "
        "8 tensors, 896 bytes"
    )
    assert found.adapter is not None
    assert (found.adapter.lora_alpha, found.adapter.target_modules) == ([2.5, 6], r".*\._?\w+_proj")
    assert surgery.inspect(llama_base(tmp_path / "model")).to_json()["adapter"] is None


def test_inspect_names_each_kind_of_module_once_and_only_some_of_many(tmp_path: Path) -> None:
    model = nn.Sequential(*(nn.ModuleDict({f"m{j:02}": nn.Linear(3, 3) for j in range(i + 9)}) for i in range(2)))
    for count, shown in ((1, "m00"), (2, "m00, m01"), (10, "m00, m01, m02, m03, m04, m05, m06, m07 and 2 more")):
        here = surgery.inject(
            deepcopy(model), surgery.LoraConfig(r=2, target_modules=[f"m{j:02}" for j in range(count)])
        )
        surgery.save(here, tmp_path / str(count))
        assert f"; target_modules {shown}; " in str(surgery.inspect(tmp_path / str(count)))


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (surgery.LoraConfig(r=2, target_modules=["0"], use_dora=True), "DoRA; r 2; lora_alpha 8; target_modules 0; "),
        (surgery.IA3Config(target_modules=["0"], feedforward_modules=[]), "IA3; target_modules 0; "),
        (
            surgery.AdaLoraConfig(init_r=3, target_r=2, target_modules=["0"], total_step=9),
            "AdaLoRA; r 3; lora_alpha 8; target_modules 0; ",
        ),
        (surgery.MissConfig(r=2, target_modules=["0"]), "MiSS; r 2; target_modules 0; "),
        (surgery.LoHaConfig(r=3, alpha=2, target_modules=["0"]), "LoHa; r 3; alpha 2; target_modules 0; "),
        (surgery.LoKrConfig(r=1, target_modules=["0"]), "LoKr; r 1; alpha 8; target_modules 0; "),
        (surgery.ShiraConfig(r=1, target_modules=["0"]), "SHiRA; r 1; target_modules 0; "),
        (surgery.GloraConfig(r=1, target_modules=["0"]), "GLoRA; r 1; target_modules 0; "),
        (
            surgery.SupertuningConfig(sparsity=0.5, r=1, target_modules=["0"]),
            "Super-Tuning; r 1; lora_alpha 2; target_modules 0; ",
        ),
        (surgery.C3AConfig(block_size=2, target_modules=["0"]), "C3A; target_modules 0; "),
        (surgery.WaveFTConfig(n_frequency=5, target_modules=["0"]), "WaveFT; target_modules 0; "),
        (surgery.FourierFTConfig(n_frequency=5, target_modules=["0"]), "FourierFT; target_modules 0; "),
        (
            surgery.LoraConfig(r=2, target_modules=["0", "1"], rank_pattern={"1": 1}),
            "LoRA; r 1 to 2; lora_alpha 8; target_modules 0, 1; ",
        ),
        (surgery.LoraConfig(r=2, target_parameters=["0.weight"]), "LoRA; r 2; lora_alpha 8; 2 tensors"),
    ],
    ids=lambda one: one.peft_type if isinstance(one, surgery.AdapterConfig) else "",
)
def test_inspect_says_what_an_adapter_of_any_method_is(config: object, told: str, tmp_path: Path) -> None:
    model = surgery.inject(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), config)
    surgery.save(model, tmp_path / "adapter")
    assert str(surgery.inspect(tmp_path / "adapter")).startswith(f"adapter: {told}")
