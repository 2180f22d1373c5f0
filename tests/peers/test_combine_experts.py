"""combine of adapters with `target_parameters`: expert by expert as linears, as merges one after another, for peft."""

import math
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)

import surgery

EPS = torch.finfo(torch.float32).eps
SIZES = {"vocab_size": 31, "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"num_key_value_heads": 2, "tie_word_embeddings": False, "num_experts_per_tok": 2, "num_local_experts": 3}
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SIZES, intermediate_size=20)),
    "gpt_oss": lambda: GptOssForCausalLM(GptOssConfig(**SIZES, intermediate_size=20, head_dim=8)),
}
each_model = pytest.mark.parametrize("name", MODELS)
FIELDS = {"r": 2, "lora_alpha": 5, "target_modules": ["o_proj"], "init_lora_weights": False}
FIELDS |= {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
METHODS = {
    "cat": {},
    "svd": {"rank": 3},
    "linear": {},
    "ties": {"density": 0.6, "majority_sign_method": "frequency"},
    "magnitude_prune": {"density": 0.6},
    "dare_linear": {"density": 0.5, "seed": 7},
    "dare_ties": {"density": 0.5},
}
WEIGHTS = [0.75, -1.5]


def made(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return MODELS[name]().eval()


def adapter(name: str, folder: Path, seed: int, by: str = "peft", **fields: object) -> Path:
    torch.manual_seed(seed)
    if by == "peft":
        peft.get_peft_model(made(name), peft.LoraConfig(**FIELDS | fields)).save_pretrained(folder)
    else:
        surgery.save(surgery.inject(made(name), surgery.LoraConfig(**FIELDS | fields)), folder)
    return folder


def held(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(torch.arange(14).view(2, 7)).logits


def near(wanted: Tensor, unit: float) -> dict[str, float]:
    """Of about twenty maps in a row, with sums of at most 40 terms."""
    return {"rtol": 0.0, "atol": 20 * 40 * unit * float(wanted.abs().max() + 1)}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # peft warns of patterns that only parameters match
@each_model
def test_cat_is_what_the_adapters_are_merged_one_after_another(name: str, tmp_path: Path) -> None:
    """Of other ranks and alphas, of which one leaves a stack out."""
    both = [
        adapter(name, tmp_path / "a", 1, rank_pattern={".*experts.down_proj": 3}),
        adapter(name, tmp_path / "b", 2, "surgery", r=1, use_rslora=True, target_parameters=["experts.down_proj"]),
    ]
    given = list(zip(both, WEIGHTS, strict=True))
    report = surgery.combine(given, tmp_path / "sum")
    ranks = {site.rpartition(".")[2]: one.r for site, one in report.sites.items()}
    assert ranks == {"o_proj": 3, "gate_up_proj": 2, "down_proj": 4}
    assert report.relative_error <= EPS  # one rounding of each element of A
    made(name).save_pretrained(tmp_path / "base")
    surgery.merge_checkpoint(tmp_path / "base", tmp_path / "sum", tmp_path / "one")
    surgery.merge_checkpoint(tmp_path / "base", given, tmp_path / "both")
    one, both_merged = (AutoModelForCausalLM.from_pretrained(tmp_path / name).eval() for name in ("one", "both"))
    wanted = logits(both_merged)
    # The grid of 22 bits costs r * 2^-21 of each product, r at most 4, in place of float32's rounding of it.
    torch.testing.assert_close(logits(one), wanted, **near(wanted, 4 * 2.0**-21))
    assert float((logits(made(name)) - wanted).abs().max()) > 4 * near(wanted, 4 * 2.0**-21)["atol"]
    for model in (
        surgery.load(made(name), tmp_path / "sum"),
        peft.PeftModel.from_pretrained(made(name), tmp_path / "sum").eval(),
    ):
        torch.testing.assert_close(logits(model), wanted, **near(wanted, 4 * 2.0**-21))


def by_expert(tensors: dict[str, Tensor], r: int) -> list[dict[str, Tensor]]:
    """A and B of each of three, of the one stack of an adapter, as PEFT lays them."""
    A, B = (next(one for key, one in tensors.items() if f"lora_{role}" in key) for role in "AB")
    return [{"A": A[n * r : (n + 1) * r], "B": B[:, n::3]} for n in range(3)]


@pytest.mark.parametrize("method", METHODS)
def test_each_expert_has_the_bits_of_a_linear_layer_of_its_own(method: str, tmp_path: Path) -> None:
    class Bank(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bank = nn.Module()
            self.bank.table = nn.Parameter(torch.zeros(3, 6, 5))

    stacks, singles = [], []
    for seed in range(2):
        torch.manual_seed(seed)
        fields = {"r": 2, "lora_alpha": 3 + seed, "init_lora_weights": False}
        config = surgery.LoraConfig(**fields, target_parameters=["bank.table"])
        stacks.append(tmp_path / f"stack {seed}")
        singles.append(tmp_path / f"single {seed}")
        surgery.save(surgery.inject(Bank(), config), stacks[-1])
        surgery.LoraConfig(**fields, target_modules=["0", "1", "2"]).save_pretrained(singles[-1])
        named = {
            f"base_model.model.{number}.lora_{role}.weight": values.contiguous()
            for number, pair in enumerate(by_expert(held(stacks[-1]), 2))
            for role, values in pair.items()
        }
        save_file(named, singles[-1] / "adapter_model.safetensors")
    told = surgery.combine(
        list(zip(stacks, WEIGHTS, strict=True)), tmp_path / "stack", method=method, **METHODS[method]
    )
    apart = surgery.combine(
        list(zip(singles, WEIGHTS, strict=True)), tmp_path / "single", method=method, **METHODS[method]
    )
    wanted, (one,) = held(tmp_path / "single"), told.sites.values()
    for number, pair in enumerate(by_expert(held(tmp_path / "stack"), one.r)):
        for role, values in pair.items():
            assert torch.equal(values, wanted[f"base_model.model.{number}.lora_{role}.weight"])
    assert one.r == apart.sites["0"].r
    assert one.error_norm == math.hypot(*(each.error_norm for each in apart.sites.values()))
    assert told.relative_error == apart.relative_error


@pytest.mark.parametrize("method", METHODS)
@each_model
def test_peft_and_a_model_read_it_as_it_is_merged(name: str, method: str, tmp_path: Path) -> None:
    both = [adapter(name, tmp_path / str(seed), seed) for seed in range(2)]
    surgery.combine(list(zip(both, WEIGHTS, strict=True)), tmp_path / "sum", method=method, **METHODS[method])
    made(name).save_pretrained(tmp_path / "base")
    surgery.merge_checkpoint(tmp_path / "base", tmp_path / "sum", tmp_path / "out")
    wanted = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval())
    for model in (
        surgery.load(made(name), tmp_path / "sum"),
        peft.PeftModel.from_pretrained(made(name), tmp_path / "sum").eval(),
    ):
        torch.testing.assert_close(logits(model), wanted, **near(wanted, 4 * 2.0**-21))


@pytest.mark.parametrize(
    "fields",
    [
        {"target_parameters": ["gate_up_proj", "down_proj"]},
        {"target_parameters": ["down_proj"], "target_modules": r".*\.o_proj"},
        {"target_parameters": ["experts.down_proj"], "target_modules": []},
    ],
    ids=str,
)
def test_entries_without_owners_and_patterns_mean_what_they_mean_in_a_model(
    fields: dict[str, object], tmp_path: Path
) -> None:
    folder = adapter("mixtral", tmp_path / "one", 1, **fields)
    surgery.combine([folder], tmp_path / "same")
    wanted = logits(surgery.load(made("mixtral"), folder))
    torch.testing.assert_close(logits(surgery.load(made("mixtral"), tmp_path / "same")), wanted, **near(wanted, EPS))
    told = surgery.LoraConfig.from_pretrained(tmp_path / "same")
    assert all(one.startswith("model.layers.") and ".experts." in one for one in told.target_parameters)
    assert all(one.endswith(".o_proj") for one in told.target_modules)


def test_adapters_of_other_experts_orders_or_parts_are_refused(tmp_path: Path) -> None:
    def two(folder: Path, shape: tuple[int, ...], names: list[str]) -> Path:
        model = nn.ModuleDict({"m": nn.Module()})
        for name in names:
            setattr(model["m"], name, nn.Parameter(torch.zeros(shape)))
        fields = {"r": 2, "target_parameters": [f"m.{name}" for name in names], "init_lora_weights": False}
        surgery.save(surgery.inject(model, surgery.LoraConfig(**fields)), folder)
        (folder / "surgery.base.json").unlink()  # which tells the bases apart before
        return folder

    three, four = two(tmp_path / "3", (3, 6, 5), ["one"]), two(tmp_path / "4", (4, 6, 5), ["one"])
    with pytest.raises(surgery.ShapeError, match=r"m\.one: the adapters are made for \[3, 4\] experts"):
        surgery.combine([three, four], tmp_path / "out")
    with pytest.raises(surgery.MatchError, match="m: one, two are adapted, which files tell apart by the module's"):
        surgery.combine([two(tmp_path / "both", (3, 6, 5), ["one", "two"])], tmp_path / "out")
    surgery.LoraConfig(r=2, target_modules=["m"]).save_pretrained(tmp_path / "whole")
    tensors = {
        "base_model.model.m.lora_A.weight": torch.ones(2, 5),
        "base_model.model.m.lora_B.weight": torch.ones(6, 2),
    }
    save_file(tensors, tmp_path / "whole" / "adapter_model.safetensors")
    with pytest.raises(surgery.InputError, match="m is adapted, and so are parameters of it"):
        surgery.combine([three, tmp_path / "whole"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("printed", [True, False], ids=["base known", "known by name"])
@pytest.mark.parametrize("rank", [1, 2], ids="rank {} in the config".format)
def test_a_damaged_rank_of_a_matrix_makes_no_stack_of_it(printed: bool, rank: int, tmp_path: Path) -> None:
    own = "table" if printed else "q_proj_weight"
    model = nn.ModuleDict({"m": nn.Module()})
    setattr(model["m"], own, nn.Parameter(torch.zeros(6, 5)))
    fields = {"r": 4, "target_parameters": [f"m.{own}"], "init_lora_weights": False}
    surgery.save(surgery.inject(model, surgery.LoraConfig(**fields)), tmp_path / "one")
    surgery.combine([tmp_path / "one"], tmp_path / "whole")
    if not printed:
        (tmp_path / "one" / "surgery.base.json").unlink()
    surgery.LoraConfig(**fields | {"r": rank}).save_pretrained(tmp_path / "one")
    found = rf"one: m\.{own}: the factors are those of {4 // rank} matrices .* the parameter is one matrix"
    with pytest.raises(surgery.ShapeError, match=found):
        surgery.combine([tmp_path / "one"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def tables(folder: Path, ranks: dict[str, int]) -> Path:
    """An adapter of two layers' matrices under a name that nobody knows, of rank 4, by a config that says otherwise."""
    model = nn.ModuleDict({"0": nn.Module(), "1": nn.Module()})
    for one in model.values():
        one.table = nn.Parameter(torch.zeros(6, 5))
    fields = {"r": 4, "target_parameters": ["0.table", "1.table"], "init_lora_weights": False}
    surgery.save(surgery.inject(model, surgery.LoraConfig(**fields)), folder)
    (folder / "surgery.base.json").unlink()
    surgery.LoraConfig(**fields | {"rank_pattern": ranks}).save_pretrained(folder)
    return folder


def test_a_damaged_rank_that_nothing_tells_is_seen_by_the_other_layers_or_said(tmp_path: Path) -> None:
    whole = surgery.combine([tables(tmp_path / "whole", {})], tmp_path / "out")
    assert whole.notes == ()
    found = r"one: 1\.table: the factors are those of 2 matrices .* those of 0\.table of 1; a damaged rank"
    with pytest.raises(surgery.ShapeError, match=found):
        surgery.combine([tables(tmp_path / "one", {"1.table": 2})], tmp_path / "none")
    assert not (tmp_path / "none").exists()
    both = surgery.combine([tables(tmp_path / "both", {"0.table": 2, "1.table": 2})], tmp_path / "stacks")
    told = "table is taken for a stack of 2 by its config's rank, since no surgery.base.json tells its shape"
    assert [note.partition(".")[2] for note in both.notes] == [told, told]
    assert both.summary().count(told) == 2
    assert both.to_json()["notes"] == list(both.notes)


def test_a_damaged_rank_of_a_stack_makes_no_more_experts(tmp_path: Path) -> None:
    folder = adapter("mixtral", tmp_path / "one", 1, "surgery")
    surgery.LoraConfig(**FIELDS | {"rank_pattern": {".*experts.down_proj": 1}}).save_pretrained(folder)
    with pytest.raises(surgery.ShapeError, match=r"down_proj: .* of 6 matrices .* the parameter is a stack of 3"):
        surgery.combine([folder], tmp_path / "out")
