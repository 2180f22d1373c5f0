"""Modules of experts, stacks in memory and single matrices in files: adapters by peft, merged through files."""

from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import surgery
from surgery.core.name_map import USUAL
from surgery.hosts.checkpoint import Checkpoint
from surgery.integrations.transformers import name_map

SIZES = {"vocab_size": 31, "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"num_key_value_heads": 2, "tie_word_embeddings": False, "num_experts_per_tok": 2}
SPARSE = {"intermediate_size": 20, "moe_intermediate_size": 8, "num_experts": 3, "head_dim": 8}
DEEP = {"intermediate_size": 20, "moe_intermediate_size": 8, "n_routed_experts": 4, "n_group": 2, "topk_group": 2}
DEEP |= {"q_lora_rank": None, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SIZES, intermediate_size=20, num_local_experts=3)),
    "qwen2_moe": lambda: Qwen2MoeForCausalLM(
        Qwen2MoeConfig(**SIZES, **SPARSE, shared_expert_intermediate_size=16, decoder_sparse_step=1)
    ),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **SPARSE, decoder_sparse_step=1)),
    "deepseek_v3": lambda: DeepseekV3ForCausalLM(DeepseekV3Config(**SIZES, **DEEP, first_k_dense_replace=1)),
    "gpt_oss": lambda: GptOssForCausalLM(GptOssConfig(**SIZES, intermediate_size=20, num_local_experts=3, head_dim=8)),
}
FIELDS = {"r": 2, "lora_alpha": 5, "target_modules": ["o_proj"], "init_lora_weights": False}
FIELDS |= {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
FIELDS |= {"rank_pattern": {".*experts.down_proj": 3}, "alpha_pattern": {".*layers.1.*down_proj": 4}}
each_model = pytest.mark.parametrize("name", MODELS)
each_square = pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])


def made(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return MODELS[name]().eval()


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model(torch.arange(14).view(2, 7)).logits


def near(wanted: Tensor, unit: float) -> dict[str, float]:
    """Of about twenty maps in a row, with sums of at most 40 terms, whose outcomes norms bring to about 1."""
    return {"rtol": 0.0, "atol": 20 * 40 * unit * float(wanted.abs().max() + 1)}


def by_peft(name: str, folder: Path, **fields: object) -> peft.PeftModel:
    torch.manual_seed(1)
    theirs = peft.get_peft_model(made(name), peft.LoraConfig(**FIELDS | fields)).eval()
    theirs.save_pretrained(folder)
    return theirs


def tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # peft warns of patterns that only parameters match
@each_model
def test_what_is_merged_through_files_loads_as_what_peft_has_trained(name: str, tmp_path: Path) -> None:
    theirs = by_peft(name, tmp_path / "adapter")
    made(name).save_pretrained(tmp_path / "base")
    surgery.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", reversible=True)
    surgery.verify_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out").require()
    merged, wanted = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval(), logits(theirs)
    # The grid of 22 bits costs r * 2^-21 of each product, r at most 3, in place of float32's rounding of it.
    torch.testing.assert_close(logits(merged), wanted, **near(wanted, 3 * 2.0**-21))
    assert float((logits(made(name)) - wanted).abs().max()) > 4 * near(wanted, 3 * 2.0**-21)["atol"]
    ours = surgery.load(made(name), tmp_path / "adapter")
    torch.testing.assert_close(logits(ours), wanted, **near(wanted, torch.finfo(torch.float32).eps))
    surgery.save_merged(ours, tmp_path / "live")
    live, streamed = tensors(tmp_path / "live"), tensors(tmp_path / "out")
    assert live.keys() == streamed.keys()
    assert all(torch.equal(live[one], streamed[one]) for one in live)
    surgery.unmerge_checkpoint(tmp_path / "out", tmp_path / "back")
    assert (tmp_path / "back/model.safetensors").read_bytes() == (tmp_path / "base/model.safetensors").read_bytes()


@each_model
def test_the_usual_names_are_those_of_transformers_tables(name: str, tmp_path: Path) -> None:
    made(name).save_pretrained(tmp_path)
    with Checkpoint(tmp_path) as base:
        told = name_map(base.config)
        for info in base.tensors():
            usual, known = USUAL.rename(info.name), told.rename(info.name)
            assert usual == known
            assert (USUAL.part(usual) or [None])[:3] == (told.part(known) or [None])[:3]


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_an_adapter_of_single_experts_is_one_of_plain_layers(name: str, tmp_path: Path) -> None:
    """As adapters were before version 5 of transformers, whose layers had the names of the files."""
    made(name).save_pretrained(tmp_path / "base")
    before = tensors(tmp_path / "base")
    sites = [one.removesuffix(".weight") for one in before if ".experts." in one and not one.endswith("2.weight")]
    torch.manual_seed(3)
    factors = {
        site: (torch.randn(before[f"{site}.weight"].shape[0], 2), torch.randn(2, before[f"{site}.weight"].shape[1]))
        for site in sites
    }
    (tmp_path / "adapter").mkdir()
    surgery.LoraConfig(r=2, lora_alpha=2, target_modules=sites).save_pretrained(tmp_path / "adapter")
    named = {
        f"base_model.model.{site}.lora_{role}.weight": one
        for site, pair in factors.items()
        for role, one in zip("BA", pair, strict=True)
    }
    save_file(named, tmp_path / "adapter/adapter_model.safetensors")
    surgery.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    after = tensors(tmp_path / "out")
    for site, (B, A) in factors.items():
        exact = before[f"{site}.weight"].double() + B.double() @ A.double()
        grid = 2 * 2.0**-21 * B.abs().amax(1, keepdim=True) * A.abs().amax(0, keepdim=True)  # see core/arithmetic
        rounding = torch.finfo(torch.float32).eps / 2 * (exact.abs() + 1)
        assert bool(((after[f"{site}.weight"] - exact).abs() <= grid + rounding).all())


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_base_that_lacks_an_expert_is_refused_and_names_are_those_of_one_prefix_less(tmp_path: Path) -> None:
    by_peft("mixtral", tmp_path / "adapter")
    made("mixtral").save_pretrained(tmp_path / "base")
    held = tensors(tmp_path / "base")
    weights = tmp_path / "base/model.safetensors"
    headless = {one.removeprefix("model."): values for one, values in held.items() if one != "lm_head.weight"}
    surgery.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    save_file(headless, weights, {"format": "pt"})
    surgery.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "headless")
    merged = {f"model.{one}": values for one, values in tensors(tmp_path / "headless").items()}
    assert all(torch.equal(values, tensors(tmp_path / "out")[one]) for one, values in merged.items())
    missing = "model.layers.1.block_sparse_moe.experts.1.w3.weight"
    save_file({one: values for one, values in held.items() if one != missing}, weights, {"format": "pt"})
    with pytest.raises(
        surgery.MatchError, match=r"layers\.1\.mlp\.experts\.gate_up_proj: \.experts\.\*\.w3\.weight of expert 1"
    ):
        surgery.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "none")


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_square_stacks_are_told_by_the_family_and_refused_without_one(tmp_path: Path) -> None:
    def square() -> PreTrainedModel:
        torch.manual_seed(0)
        sizes = SIZES | {"hidden_size": 16}
        return GptOssForCausalLM(GptOssConfig(**sizes, intermediate_size=16, num_local_experts=3, head_dim=8)).eval()

    torch.manual_seed(1)
    fields = FIELDS | {"rank_pattern": {}, "alpha_pattern": {}}
    theirs = peft.get_peft_model(square(), peft.LoraConfig(**fields)).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    square().save_pretrained(tmp_path / "base")
    surgery.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    merged, wanted = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval(), logits(theirs)
    torch.testing.assert_close(logits(merged), wanted, **near(wanted, 3 * 2.0**-21))
    (tmp_path / "base/config.json").unlink()
    with pytest.raises(surgery.MatchError, match=r"down_proj: its matrices are square"):
        surgery.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "none")
