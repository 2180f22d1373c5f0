"""combine against peft's add_weighted_adapter, and peft's reading of what it writes."""

import copy
from pathlib import Path

import peft
import pytest
import torch
from peft.utils import merge_utils
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import surgery
from surgery.testing import assert_equivalent

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 99, "tie_word_embeddings": False}
WEIGHTS = [0.7, -1.3]
METHODS = {
    "cat": {},
    "svd": {},
    "linear": {},
    "ties": {"density": 0.6, "majority_sign_method": "frequency"},
    "magnitude_prune": {"density": 0.6},
    "dare_linear": {"density": 1.0},
    "dare_ties": {"density": 1.0},
}


def adapter(model: nn.Module, folder: Path, seed: int, **settings: object) -> Path:
    torch.manual_seed(seed)
    config = surgery.LoraConfig(init_lora_weights=False, **settings)  # type: ignore[arg-type]
    surgery.save(surgery.inject(copy.deepcopy(model), config), folder)
    return folder


def deltas(model: nn.Module, name: str) -> dict[str, Tensor]:
    return {
        key: layer.get_delta_weight(name).double()
        for key, layer in model.named_modules()
        if isinstance(layer, peft.tuners.lora.LoraLayer) and name in layer.scaling
    }


def in_peft(model: nn.Module, folders: list[Path]) -> peft.PeftModel:
    """All of them in one model, under the names 0, 1 ..."""
    held = peft.PeftModel.from_pretrained(copy.deepcopy(model), folders[0], adapter_name="0")
    for number, folder in enumerate(folders[1:], 1):
        held.load_adapter(folder, str(number))
    return held


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(0, 6), (6, 0)], ids=str)
def test_over_a_weight_without_elements_there_is_nothing_to_combine(
    method: str, shape: tuple[int, int], tmp_path: Path
) -> None:
    (out, into), folders = shape, [tmp_path / "0", tmp_path / "1"]
    for folder, r in zip(folders, (2, 2) if method not in {"cat", "svd"} else (2, 3), strict=True):
        config = surgery.LoraConfig(r=r, target_modules=["0"])
        config.save_pretrained(folder)
        factors = {"lora_A": torch.ones(r, into), "lora_B": torch.ones(out, r)}
        tensors = {f"base_model.model.0.{role}.weight": values for role, values in factors.items()}
        save_file(tensors, folder / "adapter_model.safetensors")
    report = surgery.combine(folders, tmp_path / "out", method=method, **METHODS[method])
    assert report.sites["0"].relative_error == 0
    model = surgery.load(nn.Sequential(nn.Linear(into, out)), tmp_path / "out")
    assert surgery.merge(model)[0].base_layer.weight.shape == shape


def close(found: Tensor, wanted: Tensor, terms: int) -> bool:
    """Within the rounding of sums of `terms` float32 products, done twice."""
    return bool((found - wanted).norm() <= 2 * terms * torch.finfo(torch.float32).eps * wanted.norm())


@pytest.fixture
def llama() -> nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL)).eval()


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.filterwarnings("ignore:The density")
def test_a_combination_has_the_deltas_of_peft(method: str, rslora: bool, llama: nn.Module, tmp_path: Path) -> None:
    both = [
        adapter(llama, tmp_path / str(n), n, r=4, lora_alpha=9, use_rslora=rslora, target_modules=["q_proj", "up_proj"])
        for n in range(2)
    ]
    report = surgery.combine(list(zip(both, WEIGHTS, strict=True)), tmp_path / "out", method=method, **METHODS[method])
    model = in_peft(llama, [*both, tmp_path / "out"])
    # peft 0.21.2 leaves use_rslora of the first on, with alpha = r, so that its outcome is scaled by sqrt(r) too much
    for config in model.peft_config.values():
        config.use_rslora = False
    model.base_model.add_weighted_adapter(["0", "1"], WEIGHTS, "wanted", combination_type=method, **METHODS[method])
    found, wanted = deltas(model, "2"), deltas(model, "wanted")
    assert found.keys() == wanted.keys() == deltas(model, "0").keys()
    exact = {name: sum(w * deltas(model, str(n))[name] for n, w in enumerate(WEIGHTS)) for name in found}
    for name, delta in found.items():
        assert close(delta, wanted[name], terms=64)
        told = report.sites[name.removeprefix("base_model.model.")].relative_error
        truth = float((delta - exact[name]).norm() / exact[name].norm())
        assert told == pytest.approx(truth, abs=2 * 8 * torch.finfo(torch.float32).eps)


def test_cat_of_other_ranks_sites_and_scalings_is_the_sum_in_peft(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**GPT2)).eval()
    one = adapter(model, tmp_path / "0", 0, r=4, rank_pattern={"h.1.attn.c_attn": 2}, target_modules=["c_attn", "wte"])
    other = adapter(model, tmp_path / "1", 1, r=3, lora_alpha=5, use_rslora=True, target_modules=["c_attn", "mlp.c_fc"])
    report = surgery.combine([(one, 0.3), (other, -2.0)], tmp_path / "out")
    held = in_peft(model, [one, other, tmp_path / "out"])
    first, second, found = (deltas(held, name) for name in "012")
    assert found.keys() == first.keys() | second.keys()
    for name, delta in found.items():
        wanted = 0.3 * first.get(name, torch.zeros(())) - 2.0 * second.get(name, torch.zeros(()))
        assert close(delta, wanted, terms=7)
    assert {one.r for one in report.sites.values()} == {7, 5, 4, 3}
    assert report.relative_error is not None
    assert report.relative_error <= torch.finfo(torch.float32).eps  # one rounding of each element of A


def test_dare_keeps_what_peft_keeps_with_the_same_seed(llama: nn.Module, tmp_path: Path) -> None:
    targets = ["layers.0.self_attn.q_proj"]
    both = [adapter(llama, tmp_path / str(n), n, r=4, lora_alpha=4, target_modules=targets) for n in range(2)]
    surgery.combine([(both[0], 1.0), (both[1], 1.0)], tmp_path / "out", method="dare_linear", density=0.5, seed=7)
    given = [load_file(folder / "adapter_model.safetensors") for folder in both]
    found = load_file(tmp_path / "out/adapter_model.safetensors")
    torch.manual_seed(7)
    for key in sorted(found):  # A, then B
        assert torch.equal(found[key], merge_utils.dare_linear([one[key] for one in given], torch.ones(2), 0.5))


def images() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 6, (2, 3)))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.filterwarnings("ignore:The density")
def test_convolutions_are_combined_as_the_matrices_that_they_are(method: str, tmp_path: Path) -> None:
    fields = {"r": 4, "lora_alpha": 9, "target_modules": ["0", "2", "3"]}
    both = [adapter(images(), tmp_path / str(n), n, **fields) for n in range(2)]
    report = surgery.combine(list(zip(both, WEIGHTS, strict=True)), tmp_path / "out", method=method, **METHODS[method])
    first, second, found = (deltas(in_peft(images(), [*both, tmp_path / "out"]), name) for name in "012")
    for name, delta in found.items():
        exact = WEIGHTS[0] * first[name] + WEIGHTS[1] * second[name]
        told = report.sites[name.removeprefix("base_model.model.")].relative_error
        # Sums of up to 8 products in each of the three deltas.
        near = 3 * 8 * torch.finfo(torch.float32).eps
        assert told == pytest.approx(float((delta - exact).norm() / exact.norm()), abs=near)
        assert method != "cat" or close(delta, exact, terms=8)
    ours, x = surgery.load(images(), tmp_path / "out"), torch.randn(4, 3, 9, 9)
    assert_equivalent(ours, in_peft(images(), [tmp_path / "out"]).eval(), x, base=images())


def test_convolutions_of_other_kernels_or_in_groups_are_refused(tmp_path: Path) -> None:
    made = {
        "wide": nn.Conv2d(2, 8, (3, 1)),
        "high": nn.Conv2d(2, 8, (1, 3)),
        "groups": nn.Conv2d(4, 8, 3, groups=2),
    }
    held = {
        name: adapter(nn.Sequential(one), tmp_path / name, 0, r=2, target_modules=["0"]) for name, one in made.items()
    }
    for folder in held.values():
        (folder / "surgery.base.json").unlink()  # which tells the bases apart before
    with pytest.raises(surgery.ShapeError, match=r"made for weights of \[\(8, 2, 1, 3\), \(8, 2, 3, 1\)\]"):
        surgery.combine([held["wide"], held["high"]], tmp_path / "out")
    with pytest.raises(surgery.ShapeError, match=r"\[out, 2, 1, ...\] in one group"):
        surgery.combine([held["groups"]], tmp_path / "out")


def test_peft_gives_each_of_two_names_that_end_alike_its_own_rank(tmp_path: Path) -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "z": nn.ModuleDict({"a": nn.Linear(4, 4)})})
    both = adapter(model, tmp_path / "0", 0, r=2, target_modules=["a"])
    inner = adapter(model, tmp_path / "1", 1, r=2, target_modules=["z.a"])
    surgery.combine([both, inner, inner], tmp_path / "out")
    held = in_peft(model, [both, inner, tmp_path / "out"])
    first, second, found = (deltas(held, name) for name in "012")
    assert len(found) == len(first) == 2
    assert all(close(found[name], first[name] + 2 * second.get(name, torch.zeros(())), terms=6) for name in found)


@pytest.mark.parametrize(
    "settings",
    [
        {"use_bdlora": {"target_modules_bd_a": ["q_proj"], "nblocks": 2}},
        {"use_qalora": True},
        {"trainable_token_indices": {"embed_tokens": [3]}},
        {"layer_replication": [[0, 2], [1, 2]]},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_what_is_more_than_a_sum_of_factors_is_refused_by_name(
    settings: dict[str, object], llama: nn.Module, tmp_path: Path
) -> None:
    folder = adapter(llama, tmp_path / "one", 1, r=2, target_modules=["q_proj"], **settings)
    with pytest.raises(surgery.InputError, match=f"it has {next(iter(settings))}, which a sum of A and B leaves out"):
        surgery.combine([(folder, 1.0)], tmp_path / "out")
