"""extract of experts that are one parameter in memory, in pieces or whole in files: beside merges, models and peft."""

import math
import weakref
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import surgery
from surgery.procedures.making.combinations import Factors
from surgery.procedures.making.low_rank import Truncation, low_rank

EPS = torch.finfo(torch.float32).eps
SIZES = {"vocab_size": 31, "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"num_key_value_heads": 2, "tie_word_embeddings": False, "num_experts_per_tok": 2}
SPARSE = {"intermediate_size": 20, "moe_intermediate_size": 8, "num_experts": 3, "head_dim": 8}
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SIZES, intermediate_size=20, num_local_experts=3)),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **SPARSE, decoder_sparse_step=1)),
    "gpt_oss": lambda: GptOssForCausalLM(GptOssConfig(**SIZES, intermediate_size=20, num_local_experts=3, head_dim=8)),
}
FORMS = [*((name, True) for name in MODELS), ("mixtral", False)]  # False: as the model holds them
each_form = pytest.mark.parametrize(("name", "original"), FORMS, ids=[f"{n}-{o}" for n, o in FORMS])
FIELDS = {"r": 2, "lora_alpha": 4, "target_modules": ["o_proj"], "init_lora_weights": False}
FIELDS |= {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}


def made(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return MODELS[name]().eval()


def saved(model: PreTrainedModel, folder: Path, original: bool = True) -> Path:
    model.save_pretrained(folder, save_original_format=original)
    return folder


def tuned(name: str, folder: Path, original: bool = True, **fields: object) -> Path:
    """With a random LoRA merged into its experts and o_proj."""
    torch.manual_seed(1)
    model = surgery.inject(made(name), surgery.LoraConfig(**FIELDS | fields))
    return saved(surgery.eject(surgery.merge(model), keep_merged=True), folder, original)


def tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model(torch.arange(14).view(2, 7)).logits


def grids(adapter: Path) -> float:
    """What the grid of exact arithmetic may move all deltas by, Frobenius, see core/arithmetic."""
    held = load_file(adapter / "adapter_model.safetensors")
    pairs = [(A, held[name.replace("lora_A", "lora_B")]) for name, A in held.items() if "lora_A" in name]
    return math.hypot(*(len(A) * 2.0**-21 * float(A.abs().amax(0).norm() * B.abs().amax(1).norm()) for A, B in pairs))


def apart(one: Path, other: Path) -> float:
    found, wanted = tensors(one), tensors(other)
    assert found.keys() == wanted.keys()
    return math.hypot(*(float((values.double() - wanted[name]).norm()) for name, values in found.items()))


def rounding(folder: Path) -> float:
    """Each element of a result is rounded once, by half a unit of its own."""
    return EPS / 2 * math.hypot(*(float(values.norm()) for values in tensors(folder).values()))


def missed(report: surgery.ExtractReport) -> float:
    return math.hypot(*(one.error_norm for one in report.sites.values()))


@each_form
def test_the_adapter_of_a_merge_gives_the_merge_back(name: str, original: bool, tmp_path: Path) -> None:
    base = saved(made(name), tmp_path / "base", original)
    wanted = tuned(name, tmp_path / "tuned", original)
    report = surgery.extract(base, wanted, tmp_path / "adapter", rank=2)
    assert {one.r for one in report.sites.values()} == {2}
    assert sum("experts" in site for site in report.sites) == 4
    # The merge has rounded each weight, which no matrix of rank 2 follows; then the factors are rounded to float32.
    exact = math.hypot(*(one.exact_norm for one in report.sites.values()))
    assert missed(report) <= rounding(wanted) + 8 * EPS * exact
    surgery.merge_checkpoint(base, tmp_path / "adapter", tmp_path / "again")
    again = tmp_path / "again"
    assert apart(again, wanted) <= missed(report) + rounding(again) + grids(tmp_path / "adapter")
    surgery.verify_checkpoint(base, tmp_path / "adapter", again).require()


@each_form
def test_a_truncated_one_is_as_near_as_its_report_tells(name: str, original: bool, tmp_path: Path) -> None:
    base = saved(made(name), tmp_path / "base", original)
    wanted = tuned(name, tmp_path / "tuned", original, r=5)
    report = surgery.extract(base, wanted, tmp_path / "adapter", rank=2)
    assert 0.1 < report.relative_error < 1
    surgery.merge_checkpoint(base, tmp_path / "adapter", tmp_path / "again")
    room = rounding(tmp_path / "again") + grids(tmp_path / "adapter")
    assert abs(apart(tmp_path / "again", wanted) - missed(report)) <= room


@pytest.mark.parametrize("name", MODELS)
def test_models_and_peft_read_the_adapter_as_it_is_meant(name: str, tmp_path: Path) -> None:
    base, wanted = saved(made(name), tmp_path / "base"), tuned(name, tmp_path / "tuned")
    surgery.extract(base, wanted, tmp_path / "adapter", rank=2)
    outcome = logits(AutoModelForCausalLM.from_pretrained(wanted).eval())
    ours = logits(surgery.load(made(name), tmp_path / "adapter"))
    theirs = logits(peft.PeftModel.from_pretrained(made(name), tmp_path / "adapter").eval())
    # About twenty maps in a row, with sums of at most 40 terms.
    near = {"rtol": 0.0, "atol": 20 * 40 * EPS * float(outcome.abs().max() + 1)}
    torch.testing.assert_close(ours, outcome, **near)
    torch.testing.assert_close(theirs, outcome, **near)
    assert float((logits(made(name)) - outcome).abs().max()) > 4 * near["atol"]


def changed(name: str, folder: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    model = made(name)
    with torch.no_grad():
        change(dict(model.named_parameters()))
    return saved(model, folder)


def test_an_expert_needs_more_than_others_and_some_nothing(tmp_path: Path) -> None:
    def change(held: dict[str, Tensor]) -> None:
        torch.manual_seed(2)
        stack = held["model.layers.1.mlp.experts.down_proj"]
        stack[1] += torch.randn(12, 3) @ torch.randn(3, 20)
        stack[2] += torch.randn(12, 1) @ torch.randn(1, 20)

    base, wanted = saved(made("mixtral"), tmp_path / "base"), changed("mixtral", tmp_path / "tuned", change)
    report = surgery.extract(base, wanted, tmp_path / "adapter", energy=1 - EPS**2)
    assert {name: one.r for name, one in report.sites.items()} == {"model.layers.1.mlp.experts.down_proj": 3}
    A = load_file(tmp_path / "adapter" / "adapter_model.safetensors")[
        "base_model.model.model.layers.1.mlp.experts.lora_A.weight"
    ].view(3, 3, 20)
    assert [int((one != 0).any(1).sum()) for one in A] == [0, 3, 1]
    surgery.merge_checkpoint(base, tmp_path / "adapter", tmp_path / "again")
    found, before = tensors(tmp_path / "again"), tensors(base)
    alike = {name for name, values in found.items() if torch.equal(values, before[name])}
    held = "model.layers.1.block_sparse_moe.experts."
    assert found.keys() - alike == {f"{held}1.w2.weight", f"{held}2.w2.weight"}


def test_biases_of_experts_are_parameters_too_and_what_else_there_is_cannot_be_saved(tmp_path: Path) -> None:
    def change(held: dict[str, Tensor]) -> None:
        for name, values in held.items():
            if "experts." in name:
                values.add_(torch.randn_like(values) / 8)

    base, wanted = saved(made("gpt_oss"), tmp_path / "base"), changed("gpt_oss", tmp_path / "tuned", change)
    report = surgery.extract(base, wanted, tmp_path / "adapter", energy=1.0)
    assert {name.rpartition(".")[2] for name in report.sites} == {
        *("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")
    }
    assert report.sites["model.layers.0.mlp.experts.down_proj_bias"].r == 3  # as many as there are experts
    surgery.merge_checkpoint(base, tmp_path / "adapter", tmp_path / "again")
    room = missed(report) + rounding(tmp_path / "again") + grids(tmp_path / "adapter")
    assert apart(tmp_path / "again", wanted) <= room
    outcome = logits(AutoModelForCausalLM.from_pretrained(wanted).eval())
    near = {"rtol": 0.0, "atol": 20 * 40 * EPS * float(outcome.abs().max() + 1)}
    for model in (
        surgery.load(made("gpt_oss"), tmp_path / "adapter"),
        peft.PeftModel.from_pretrained(made("gpt_oss"), tmp_path / "adapter").eval(),
    ):
        torch.testing.assert_close(logits(model), outcome, **near)
    targets = ["experts.gate_up_proj", "experts.down_proj"]
    with pytest.raises(surgery.MatchError, match=r"experts: parameters of it are adapted, .* `rest=drop`"):
        surgery.extract(base, wanted, tmp_path / "2", rank=1, targets=targets, rest="save")
    report = surgery.extract(base, wanted, tmp_path / "2", rank=1, targets=targets, rest="drop")
    assert len(report.sites) == 4


def test_how_a_stack_lies_that_no_family_tells_is_asked_for(tmp_path: Path) -> None:
    torch.manual_seed(3)
    before = {"bank.table": torch.randn(3, 5, 4), "fc.weight": torch.randn(4, 4)}
    change = torch.stack([torch.randn(5, 1) @ torch.randn(1, 4) for _ in range(3)])
    for name, held in (("base", before), ("tuned", before | {"bank.table": before["bank.table"] + change})):
        (tmp_path / name).mkdir()
        save_file(held, tmp_path / name / "model.safetensors")
    with pytest.raises(surgery.InputError, match="no matrix changed that is to be taken"):
        surgery.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "adapter", rank=1)
    for op, shape in (("linear", [3, 4]), ("conv1d", [3, 5])):
        out = tmp_path / op
        report = surgery.extract(tmp_path / "base", tmp_path / "tuned", out, rank=1, ops={"table": op})
        held = load_file(out / "adapter_model.safetensors")
        assert list(held["base_model.model.bank.lora_A.weight"].shape) == shape
        assert surgery.LoraConfig.from_pretrained(out).target_parameters == ["bank.table"]
        surgery.merge_checkpoint(tmp_path / "base", out, tmp_path / f"{op} merged")
        room = missed(report) + rounding(tmp_path / "tuned") + grids(out)
        assert apart(tmp_path / f"{op} merged", tmp_path / "tuned") <= room


def test_another_base_is_refused_by_what_its_experts_were(tmp_path: Path) -> None:
    base, wanted = saved(made("mixtral"), tmp_path / "base"), tuned("mixtral", tmp_path / "tuned")
    surgery.extract(base, wanted, tmp_path / "adapter", rank=2, targets=["down_proj"], rest="drop")
    with pytest.raises(surgery.InputError, match="trained on another base"):
        surgery.merge_checkpoint(wanted, tmp_path / "adapter", tmp_path / "out")


@pytest.mark.parametrize("options", [{"rank": 2}, {"energy": 0.9}], ids=str)
@each_form
def test_of_the_weights_one_expert_s_and_of_the_factors_one_site_s_are_in_memory(
    name: str, original: bool, options: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, wanted = saved(made(name), tmp_path / "base", original), tuned(name, tmp_path / "tuned", original)
    deltas: list[weakref.ref[Tensor]] = []
    factors: list[weakref.ref[Tensor]] = []

    def watched(delta: Tensor, truncation: Truncation) -> Factors:
        assert not any(one() is not None for one in deltas), "an earlier expert's change is still there"
        assert sum(one() is not None for one in factors) <= 2 * 2, "more than a site's three experts have factors"
        made = low_rank(delta, truncation)
        deltas.append(weakref.ref(delta))
        factors.extend(weakref.ref(one) for one in (made.A, made.B))
        return made

    monkeypatch.setattr("surgery.procedures.making.factored.low_rank", watched)
    surgery.extract(base, wanted, tmp_path / "adapter", **options)
    assert len(deltas) == 2 * (2 * 3 + 1)  # layers; two stacks of three experts, and o_proj
