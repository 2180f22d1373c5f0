"""extract: the adapter between two checkpoints, as peft and a merge read it."""

import math
import weakref
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    ElectraConfig,
    ElectraModel,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
)

import surgery
from surgery.procedures.making.combinations import Factors
from surgery.procedures.making.low_rank import Truncation, low_rank, residual_norm
from surgery.testing import assert_equivalent

EPS = torch.finfo(torch.float32).eps


def llama(dtype: torch.dtype = torch.float32) -> nn.Module:
    small = LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=99)
    torch.manual_seed(0)
    return LlamaForCausalLM(small).to(dtype)


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=99, tie_word_embeddings=False))


def resnet() -> nn.Module:
    torch.manual_seed(0)
    small = ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], num_labels=3)
    return ResNetForImageClassification(small)


TOKENS = torch.arange(12).view(2, 6)
MODELS = {
    "llama": (llama, ["q_proj", "down_proj", "embed_tokens", "lm_head"], TOKENS),
    "gpt2": (gpt2, ["c_attn", "c_proj", "wte"], TOKENS),
    "resnet": (resnet, ["convolution"], torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)),
}


def saved(model: nn.Module, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def tuned_by_lora(model: nn.Module, targets: list[str], folder: Path) -> Path:
    """`model` with a random LoRA of rank 4 merged into it."""
    torch.manual_seed(1)
    surgery.inject(model, surgery.LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
    model.save_merged(folder)
    return folder


def grids(adapter: Path) -> list[float]:
    """What the grid of exact arithmetic may move each delta by, Frobenius, see core/arithmetic."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    pairs = [(tensors[name], tensors[name.replace("lora_A", "lora_B").replace("ding_A", "ding_B")]) for name in tensors]
    return [len(A) * 2.0**-21 * float(A.abs().amax(0).norm() * B.abs().amax(1).norm()) for A, B in pairs if A is not B]


@pytest.mark.parametrize("kind", MODELS)
def test_the_adapter_of_a_merge_gives_the_merge_back(kind: str, tmp_path: Path) -> None:
    make, targets, _ = MODELS[kind]
    base = saved(make(), tmp_path / "base")
    tuned = tuned_by_lora(make(), targets, tmp_path / "tuned")
    report = surgery.extract(base, tuned, tmp_path / "adapter", rank=4)
    assert {one.r for one in report.sites.values()} == {4}
    # Each weight of a merge is rounded to float32, which a matrix of rank 4 cannot follow; and so are the factors.
    rounding = {
        name: EPS * values.float().norm().item() for name, values in load_file(tuned / "model.safetensors").items()
    }
    for name, one in report.sites.items():
        assert one.error_norm <= rounding[f"{name}.weight"] + 8 * EPS * one.exact_norm
    surgery.merge_checkpoint(base, tmp_path / "adapter", tmp_path / "again")
    found = surgery.diff(tmp_path / "again", tuned)
    apart = math.hypot(*(one.difference.norm_apart or 0.0 for one in found.tensors.values()))
    errors = math.hypot(*(one.error_norm for one in report.sites.values()))
    assert apart <= errors + math.hypot(*rounding.values()) + math.hypot(*grids(tmp_path / "adapter"))


@pytest.mark.parametrize("kind", MODELS)
def test_peft_reads_the_adapter_as_it_is_meant(kind: str, tmp_path: Path) -> None:
    make, targets, given = MODELS[kind]
    base = saved(make(), tmp_path / "base")
    tuned = tuned_by_lora(make(), targets, tmp_path / "tuned")
    left_out = EPS**2  # of the energy: no more than what rounding a change to float32 takes from it
    report = surgery.extract(base, tuned, tmp_path / "adapter", energy=1 - left_out, rank=8)
    merged = load_file(tuned / "model.safetensors")
    for name, one in report.sites.items():  # or else the rank is 8, and what is left is the rounding of the merge
        assert one.error_norm <= 8 * EPS * one.exact_norm + EPS * merged[f"{name}.weight"].norm()
    laid = peft.PeftModel.from_pretrained(make(), tmp_path / "adapter")
    assert_equivalent(laid, type(make()).from_pretrained(tuned), given, base=make())


def test_what_is_made_for_a_convolution_in_groups_is_merged_on_files_and_refused_by_a_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    grouped, tuned = (nn.Sequential(nn.Conv2d(4, 8, 3, groups=2)) for _ in range(2))
    for name, model in (("base", grouped), ("tuned", tuned)):
        (tmp_path / name).mkdir()
        save_file(tuned.state_dict() | {"0.weight": model[0].weight.detach()}, tmp_path / name / "model.safetensors")
    surgery.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "adapter", energy=1.0)
    surgery.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    change = (tuned[0].weight - grouped[0].weight).detach()
    found = load_file(tmp_path / "out" / "model.safetensors")["0.weight"] - tuned[0].weight.detach()
    assert float(found.norm()) <= 32 * EPS * float(change.norm()) + math.hypot(*grids(tmp_path / "adapter"))
    with pytest.raises(surgery.ShapeError, match=r"\[8, 4, 3, 3\] is wanted by this base"):
        surgery.load(grouped, tmp_path / "adapter")


@pytest.mark.parametrize("wanted", [1, 3, 7])
def test_a_rank_is_as_near_as_any_matrix_of_that_rank(wanted: int) -> None:
    torch.manual_seed(2)
    matrix = torch.randn(60, 9, dtype=torch.float64) @ torch.randn(9, 200, dtype=torch.float64)
    best = torch.linalg.svdvals(matrix)[wanted:].norm()
    made = low_rank(matrix, Truncation(rank=wanted))
    assert made.A.shape == (wanted, 200)
    # More directions are looked for than the matrix has, so that rounding alone, to float32, parts it from the best:
    # of sums of 200 terms for each output and of 60 for each input.
    assert residual_norm(matrix, made) <= best + (200 + 60) * EPS * matrix.norm()


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.999])
def test_an_energy_is_held_by_the_least_rank(energy: float) -> None:
    torch.manual_seed(3)
    values = torch.tensor([2.0**-k for k in range(40)], dtype=torch.float64)
    left, right = (torch.linalg.qr(torch.randn(n, 40, dtype=torch.float64)).Q for n in (300, 200))
    matrix = left * values @ right.T
    shares = values.square().cumsum(0) / values.square().sum()
    made = low_rank(matrix, Truncation(energy=energy))
    assert len(made.A) == int((shares < energy).sum()) + 1
    assert residual_norm(matrix, made) ** 2 <= (1 - energy) * float(matrix.norm()) ** 2


def test_a_matrix_of_full_rank_is_held_whole_where_all_energy_is_asked_for() -> None:
    torch.manual_seed(4)
    matrix = torch.randn(20, 30, dtype=torch.float64) * 1e-30
    made = low_rank(matrix, Truncation(energy=1.0))
    assert residual_norm(matrix, made) <= 20 * EPS * matrix.norm()


def norm_tuned(folder: Path) -> Path:
    model = llama()
    with torch.no_grad():
        model.model.norm.weight.add_(0.5)
        model.model.layers[0].self_attn.q_proj.weight.add_(torch.ones(32, 1))
    return saved(model, folder)


def test_other_changes_are_refused_saved_whole_or_left_out(tmp_path: Path) -> None:
    base, tuned, out = saved(llama(), tmp_path / "base"), norm_tuned(tmp_path / "tuned"), tmp_path / "adapter"
    with pytest.raises(surgery.MatchError, match=r"model\.norm: it changed, and no LoRA .* `rest=save`"):
        surgery.extract(base, tuned, out, rank=1)
    assert not out.exists()
    report = surgery.extract(base, tuned, out, rank=1, rest="save")
    assert report.saved == ["model.norm"]
    surgery.merge_checkpoint(base, out, tmp_path / "again")
    found = surgery.diff(tmp_path / "again", tuned).tensors
    assert found["model.norm.weight"].what == "equal"
    report = surgery.extract(base, tuned, out, rank=1, rest="drop", overwrite=True)
    assert list(report.sites) == ["model.layers.0.self_attn.q_proj"]
    assert report.dropped == ["model.norm"]


def tied(change: float = 0.0) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    small = GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=99)
    model = GPT2LMHeadModel(small).eval()
    with torch.no_grad():
        model.transformer.wte.weight.add_(change * torch.randn(99, 2) @ torch.randn(2, 32))
    return model


def test_a_head_that_is_tied_has_the_factors_of_its_embedding(tmp_path: Path) -> None:
    base, tuned = saved(tied(), tmp_path / "base"), saved(tied(0.1), tmp_path / "tuned")
    report = surgery.extract(base, tuned, tmp_path / "adapter", rank=2)
    assert list(report.sites) == ["transformer.wte"]
    surgery.merge_checkpoint(base, tmp_path / "adapter", tmp_path / "again")
    again = GPT2LMHeadModel.from_pretrained(tmp_path / "again").eval()
    assert again.lm_head.weight is again.transformer.wte.weight
    missed = again.transformer.wte.weight - tied(0.1).transformer.wte.weight
    assert missed.abs().max() <= 64 * EPS * again.transformer.wte.weight.abs().max()
    x = torch.arange(9)[None]
    laid = surgery.load(tied(), tmp_path / "adapter")
    assert_equivalent(laid, again, x, base=tied())
    assert_equivalent(laid, peft.PeftModel.from_pretrained(tied(), tmp_path / "adapter"), x, base=tied())
    other = tied(0.1)
    with torch.no_grad():
        other.transformer.h[0].mlp.c_fc.weight.mul_(2)
    with pytest.raises(surgery.MatchError, match="it is the output head too"):
        surgery.extract(base, saved(other, tmp_path / "2"), tmp_path / "3", rank=2, targets=["c_fc"], rest="save")


@pytest.mark.parametrize("options", [{"rank": 2}, {"energy": 0.9}], ids=str)
def test_of_the_weights_and_factors_those_of_one_site_are_in_memory(
    options: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, other = saved(llama(), tmp_path / "base"), llama()
    with torch.no_grad():
        for values in other.parameters():
            values.add_(torch.randn_like(values) * (values.dim() > 1))
    tuned = saved(other, tmp_path / "tuned")
    del other
    seen: list[weakref.ref[torch.Tensor]] = []

    def watched(delta: torch.Tensor, truncation: Truncation) -> Factors:
        assert not any(one() is not None for one in seen), "what an earlier site was made of is still there"
        made = low_rank(delta, truncation)
        seen[:] = [weakref.ref(one) for one in (delta, made.A, made.B)]
        return made

    monkeypatch.setattr("surgery.procedures.making.factored.low_rank", watched)
    report = surgery.extract(base, tuned, tmp_path / "adapter", **options)
    assert len(report.sites) > 4


def damaged(change: Callable[[nn.Module], None]) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        model = llama()
        with torch.no_grad():
            change(model)
        return saved(model, folder)

    return make


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        (llama, damaged(lambda _: None), "every tensor is as in the base"),
        (llama, damaged(lambda model: model.model.norm.weight.mul_(2)), "no matrix changed"),
        (llama, damaged(lambda model: model.lm_head.weight.fill_(math.nan)), "holds NaN or infinity"),
        (llama, damaged(lambda model: model.resize_token_embeddings(100)), "a resized vocabulary"),
        (llama, lambda folder: saved(gpt2(), folder), "checkpoints of the same names"),
    ],
)
def test_what_no_adapter_can_tell_is_refused(
    before: Callable[[], nn.Module], after: Callable[[Path], Path], words: str, tmp_path: Path
) -> None:
    base = saved(before(), tmp_path / "base")
    tuned = after(tmp_path / "tuned")
    with pytest.raises(surgery.InputError, match=words):
        surgery.extract(base, tuned, tmp_path / "adapter", rank=2)
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "neither `rank` nor `energy`"),
        ({"rank": 0}, "1 or more"),
        ({"energy": 1.5}, "above 0 and at most 1"),
        ({"rank": 2, "rest": "keep"}, "refuse, save or drop"),
        ({"rank": 2, "ops": {"x": "conv9d"}}, "one of linear, conv1d, embedding"),
        ({"rank": 2, "targets": ["q_prj"]}, "nearest are q_proj"),
    ],
)
def test_a_setting_that_cannot_be_is_a_usage_error(options: dict[str, object], words: str, tmp_path: Path) -> None:
    base, tuned = saved(llama(), tmp_path / "base"), norm_tuned(tmp_path / "tuned")
    with pytest.raises(surgery.UsageError, match=words):
        surgery.extract(base, tuned, tmp_path / "adapter", **options)  # type: ignore[arg-type]


def test_an_adapter_of_bfloat16_checkpoints_knows_its_base(tmp_path: Path) -> None:
    base = saved(llama(torch.bfloat16), tmp_path / "base")
    tuned = tuned_by_lora(llama(torch.bfloat16), ["v_proj"], tmp_path / "tuned")
    report = surgery.extract(base, tuned, tmp_path / "adapter", rank=4)
    assert 0 < report.relative_error < 0.1  # what rounding to bfloat16 adds is of full rank
    assert surgery.merge_checkpoint(base, tmp_path / "adapter", tmp_path / "again").out.is_dir()
    with pytest.raises(surgery.InputError, match="trained on another base"):
        surgery.merge_checkpoint(tuned, tmp_path / "adapter", tmp_path / "wrong")


def neox() -> nn.Module:
    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return GPTNeoXForCausalLM(GPTNeoXConfig(**small, vocab_size=31))


def test_a_site_that_files_call_otherwise_goes_by_its_name_in_memory(tmp_path: Path) -> None:
    """GPT-NeoX's head is embed_out in files."""
    base, other = saved(neox(), tmp_path / "base"), neox()
    heads = [name for name, values in other.named_parameters() if name.endswith(("embed_out.weight", "lm_head.weight"))]
    assert heads == ["lm_head.weight"]
    with torch.no_grad():
        other.lm_head.weight.mul_(1.5)
    tuned = saved(other, tmp_path / "tuned")
    report = surgery.extract(base, tuned, tmp_path / "adapter", rank=16)
    assert [*report.sites] == ["lm_head"]
    live = surgery.eject(surgery.merge(surgery.load(neox(), tmp_path / "adapter")), keep_merged=True)
    missed = live.lm_head.weight - other.lm_head.weight
    assert missed.abs().max() <= 64 * EPS * other.lm_head.weight.abs().max()
    surgery.merge_checkpoint(base, tmp_path / "adapter", tmp_path / "again")
    again = GPTNeoXForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(again.lm_head.weight, live.lm_head.weight)


def electra() -> nn.Module:
    torch.manual_seed(0)
    small = {"hidden_size": 16, "embedding_size": 8, "intermediate_size": 24, "num_hidden_layers": 1}
    return ElectraModel(ElectraConfig(**small, num_attention_heads=2, vocab_size=31))


def test_an_embedding_by_a_name_that_does_not_tell_is_asked_for(tmp_path: Path) -> None:
    base, other = saved(electra(), tmp_path / "base"), electra()
    with torch.no_grad():
        other.embeddings_project.weight.mul_(1.5)
    tuned = saved(other, tmp_path / "tuned")
    with pytest.raises(surgery.MatchError, match="`ops` embeddings_project=embedding or =linear"):
        surgery.extract(base, tuned, tmp_path / "adapter", rank=1)
    assert not (tmp_path / "adapter").exists()
    surgery.extract(base, tuned, tmp_path / "adapter", rank=1, ops={"embeddings_project": "linear"})
    loaded = surgery.load(electra(), tmp_path / "adapter")
    assert "embeddings_project.lora_A.default.weight" in dict(loaded.named_parameters())
