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
    DeepseekV4Config,
    DeepseekV4ForCausalLM,
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
    surgery.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "nf4", base_as="nf4")
    apart = {
        one
        for one, values in tensors(tmp_path / "nf4").items()
        if not torch.equal(values, tensors(tmp_path / "out")[one])
    }
    assert apart == {
        one for one in tensors(tmp_path / "out") if "o_proj.weight" in one
    }  # stacks were never held in 4 bits
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


def test_stacks_are_found_where_the_tables_escape_the_dots_of_names(tmp_path: Path) -> None:
    """And files call all that is above the experts otherwise, too."""
    fields = SIZES | {"hidden_size": 16, "moe_intermediate_size": 8, "n_routed_experts": 3, "head_dim": 8}
    fields |= {"q_lora_rank": 8, "o_lora_rank": 8, "num_key_value_heads": 1}
    torch.manual_seed(0)
    DeepseekV4ForCausalLM(DeepseekV4Config(**fields)).save_pretrained(tmp_path / "base")
    live = DeepseekV4ForCausalLM.from_pretrained(tmp_path / "base")
    surgery.inject(live, surgery.LoraConfig(**FIELDS | {"target_modules": ["o_b_proj"]}))
    surgery.save(live, tmp_path / "adapter")
    surgery.save_merged(live, tmp_path / "live")
    surgery.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    found, wanted = tensors(tmp_path / "out"), tensors(tmp_path / "live")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[one], values) for one, values in wanted.items())


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


def old_adapter(name: str, folder: Path, left_out: str = "", **fields: object) -> Path:
    """As it was trained before version 5 of transformers: every layer a module, named as in the files."""
    model = made(name)
    with torch.no_grad():
        model.save_pretrained(folder / "base")
    held = tensors(folder / "base")
    targets = ("o_proj", "w1", "w2", "w3", "gate_proj", "up_proj", "down_proj", "block_sparse_moe.gate")
    sites = [one.removesuffix(".weight") for one in held if one.removesuffix(".weight").endswith(targets)]
    torch.manual_seed(4)
    found = {}
    for site in sites:
        rows, columns = held[f"{site}.weight"].shape
        if not left_out or left_out not in site:
            found[f"base_model.model.{site}.lora_A.weight"] = torch.randn(2, columns) / 3
            found[f"base_model.model.{site}.lora_B.weight"] = torch.randn(rows, 2) / 3
    config = surgery.LoraConfig(
        **{"r": 2, "lora_alpha": 3, "target_modules": [one.rpartition(".")[2] for one in targets]} | fields
    )
    config.save_pretrained(folder / "adapter")
    save_file(found, folder / "adapter/adapter_model.safetensors")
    return folder / "adapter"


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "deepseek_v3"])
@pytest.mark.parametrize("left_out", ["", ".experts.1."], ids=["all", "without one expert"])
@pytest.mark.parametrize("use_rslora", [False, True], ids=["lora", "rslora"])
def test_an_adapter_of_single_experts_is_fused_for_a_model_that_holds_stacks(
    name: str, left_out: str, use_rslora: bool, tmp_path: Path
) -> None:
    adapter = old_adapter(name, tmp_path, left_out, use_rslora=use_rslora)
    ours = surgery.load(made(name), adapter)
    before, adapted = logits(made(name)), logits(ours)
    surgery.merge_checkpoint(tmp_path / "base", adapter, tmp_path / "out")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(logits(merged), adapted, **near(adapted, 2 * 2.0**-21))
    assert float((adapted - before).abs().max()) > 4 * near(adapted, 2 * 2.0**-21)["atol"]
    # Of the stack, the columns of A run over more ranks, so that the grid's steps may be others: what is saved again
    # is another adapter to the bit.
    surgery.save(ours, tmp_path / "again")
    surgery.merge_checkpoint(tmp_path / "base", tmp_path / "again", tmp_path / "stacked")
    surgery.save_merged(ours, tmp_path / "live")
    live, streamed = tensors(tmp_path / "live"), tensors(tmp_path / "stacked")
    assert live.keys() == streamed.keys()
    assert all(torch.equal(live[one], streamed[one]) for one in live)
    assert torch.equal(logits(surgery.load(made(name), tmp_path / "again")), adapted)
    if name == "deepseek_v3":
        return  # peft 0.21.2 takes gate_proj of layers without experts for experts, and leaves it out
    theirs = peft.PeftModel.from_pretrained(made(name), tmp_path / "again").eval()
    torch.testing.assert_close(logits(theirs), adapted, **near(adapted, torch.finfo(torch.float32).eps))


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_an_adapter_of_single_experts_is_fused_for_files_that_hold_stacks(name: str, tmp_path: Path) -> None:
    adapter = old_adapter(name, tmp_path)
    made(name).save_pretrained(tmp_path / "stacks", save_original_format=False)
    planned = surgery.plan(tmp_path / "stacks", adapter).to_json()["changes"]
    stacks = [one for one in planned if one["tensor"].endswith("experts.gate_up_proj")]
    assert {one["matched"][0]["by"] for one in stacks} == {"w1, w3" if name == "mixtral" else "gate_proj, up_proj"}
    surgery.merge_checkpoint(tmp_path / "stacks", adapter, tmp_path / "merged", reversible=True)
    surgery.verify_checkpoint(tmp_path / "stacks", adapter, tmp_path / "merged").require()
    ours = surgery.load(made(name), adapter)
    adapted, merged = logits(ours), AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(merged), adapted, **near(adapted, 2 * 2.0**-21))
    live = surgery.eject(surgery.merge(ours), keep_merged=True).state_dict()
    streamed = tensors(tmp_path / "merged")
    assert live.keys() == streamed.keys()
    assert all(torch.equal(live[one], streamed[one]) for one in live)
    surgery.unmerge_checkpoint(tmp_path / "merged", tmp_path / "back")
    back = tensors(tmp_path / "back")
    assert all(torch.equal(values, back[one]) for one, values in tensors(tmp_path / "stacks").items())


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@each_model
def test_the_plan_tells_the_numbers_and_the_entry_of_each_expert(name: str, tmp_path: Path) -> None:
    by_peft(name, tmp_path / "adapter")
    made(name).save_pretrained(tmp_path / "base")
    for change in surgery.plan(tmp_path / "base", tmp_path / "adapter").to_json()["changes"]:
        (told,), (method,) = change["matched"], change["methods"]
        is_down = any(one in change["tensor"] for one in ("down_proj", "w2"))
        wanted = "o_proj" if "o_proj" in change["tensor"] else f"experts.{'down' if is_down else 'gate_up'}_proj"
        assert told["by"] == wanted
        assert told["r"] == (3 if is_down else 2)
        assert told["lora_alpha"] == (4 if is_down and "layers.1" in change["tensor"] else 5)
        assert float.fromhex(method["scaling"]) == told["lora_alpha"] / told["r"]


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_it_is_fused_as_peft_does_it(name: str, tmp_path: Path) -> None:
    adapter = old_adapter(name, tmp_path)
    theirs, ours = peft.PeftModel.from_pretrained(made(name), adapter).eval(), surgery.load(made(name), adapter)
    torch.testing.assert_close(logits(ours), logits(theirs), **near(logits(theirs), torch.finfo(torch.float32).eps))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_other_experts_than_the_adapter_s_are_refused_and_one_prefix_may_be_less(tmp_path: Path) -> None:
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
    more = MixtralForCausalLM(MixtralConfig(**SIZES, intermediate_size=20, num_local_experts=4))
    more.save_pretrained(tmp_path / "more")
    with pytest.raises(surgery.ShapeError, match=r"gate_up_proj: A is \[6, 12\], but \[8, 12\] is wanted"):
        surgery.merge_checkpoint(tmp_path / "more", tmp_path / "adapter", tmp_path / "none")
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


FUSED = {
    "dora": ({"use_dora": True}, "no DoRA and no lora_bias"),
    "dropout": ({"lora_dropout": 0.1}, "lora_dropout may be set to 0"),
    "ranks": ({"rank_pattern": {"experts.1.w1": 4}}, "several ranks or alphas"),
    "alphas": ({"alpha_pattern": {"w3": 4}}, "several ranks or alphas"),
}


@pytest.mark.parametrize(("fields", "told"), FUSED.values(), ids=FUSED.keys())
def test_what_a_stack_cannot_hold_is_refused(fields: dict[str, object], told: str, tmp_path: Path) -> None:
    adapter = old_adapter("mixtral", tmp_path, **fields)
    if fields.get("use_dora"):
        held, weights = tensors(tmp_path / "base"), load_file(adapter / "adapter_model.safetensors")
        sites = {one.removesuffix(".lora_A.weight") for one in weights if "lora_A" in one}
        inner = {site: held[f"{site.removeprefix('base_model.model.')}.weight"].norm(dim=1) for site in sites}
        named = {f"{site}.lora_magnitude_vector": norms for site, norms in inner.items()}
        save_file(weights | named, adapter / "adapter_model.safetensors")
    with pytest.raises(surgery.InputError, match=told):
        surgery.load(made("mixtral"), adapter)
