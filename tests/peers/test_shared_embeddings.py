"""T5, BART and their like: one embedding in four modules, adapted in all alike, beside peft, live and on files."""

import math
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    MarianConfig,
    MarianMTModel,
    MBartConfig,
    MBartForConditionalGeneration,
    PreTrainedModel,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
    T5Model,
)

import surgery
from surgery.io.octets import sha256_of

EPS = torch.finfo(torch.float32).eps
WEIGHTS, ADAPTER = "model.safetensors", "adapter_model.safetensors"
T5 = {"d_model": 16, "d_kv": 4, "d_ff": 20, "num_layers": 1, "num_heads": 2, "vocab_size": 29, "pad_token_id": 0}
T5 |= {"eos_token_id": 1, "decoder_start_token_id": 0}
BART = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "vocab_size": 29}
BART |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 20, "decoder_ffn_dim": 20, "max_position_embeddings": 32}
BART |= {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2, "dropout": 0.0}
BART |= {"forced_eos_token_id": None}
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "t5": lambda: T5ForConditionalGeneration(T5Config(**T5)),
    "t5 without the scale": lambda: T5ForConditionalGeneration(T5Config(**T5, tie_word_embeddings=False)),
    "t5 without a head": lambda: T5Model(T5Config(**T5)),
    "t5's encoder": lambda: T5EncoderModel(T5Config(**T5)),
    "bart": lambda: BartForConditionalGeneration(BartConfig(**BART)),
    "bart, scaled": lambda: BartForConditionalGeneration(BartConfig(**BART, scale_embedding=True)),
    "mbart": lambda: MBartForConditionalGeneration(MBartConfig(**BART)),
    "marian": lambda: MarianMTModel(MarianConfig(**BART)),
}
each_model = pytest.mark.parametrize("name", MODELS)
FIELDS = {"r": 2, "lora_alpha": 3, "ensure_weight_tying": True}
MODULES = ("shared", "encoder.embed_tokens", "decoder.embed_tokens", "lm_head")
TOKENS = torch.tensor([[5, 6, 7, 3, 4]])


def made(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return MODELS[name]().eval()


def outputs(model: nn.Module, name: str) -> Tensor:
    more = {} if name == "t5's encoder" else {"decoder_input_ids": TOKENS.flip(1)}
    with torch.no_grad():
        return model(input_ids=TOKENS, **more)[0]


def near(wanted: Tensor, unit: float = EPS) -> dict[str, float]:
    """Of about twenty maps in a row, with sums of at most 29 terms."""
    return {"rtol": 0.0, "atol": 20 * 29 * unit * float(wanted.abs().max() + 1)}


def tied_names(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_modules() if name.endswith(MODULES)]


def trained(name: str, targets: list[str] | None = None, seed: int = 2) -> nn.Module:
    """As if: its factors are random."""
    config = surgery.LoraConfig(**FIELDS, target_modules=targets or ["encoder.embed_tokens"])
    model = surgery.inject(made(name), config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for one, values in model.named_parameters():
            if "lora_" in one:
                values.copy_(torch.randn_like(values) / 3)
    return model


def hashes(file: Path) -> dict[str, str]:
    return {name: sha256_of(values) for name, values in load_file(file).items()}


@each_model
def test_one_pair_is_that_of_every_module_and_peft_reads_it_so(name: str, tmp_path: Path) -> None:
    fresh = surgery.inject(made(name), surgery.LoraConfig(**FIELDS, target_modules=["encoder.embed_tokens"]))
    assert torch.equal(outputs(fresh, name), outputs(made(name), name))
    (A, B) = [one for one, _ in fresh.named_parameters() if "lora_" in one]
    assert A.endswith("shared.lora_embedding_A.default")
    assert B.endswith("shared.lora_embedding_B.default")
    ours = trained(name)
    wanted = outputs(ours, name)
    assert float((outputs(made(name), name) - wanted).abs().max()) > 4 * near(wanted)["atol"]
    surgery.save(ours, tmp_path)
    written = {one.removeprefix("base_model.model.").partition(".lora_")[0] for one in load_file(tmp_path / ADAPTER)}
    assert written == {*tied_names(made(name))}
    laid = surgery.load(made(name), tmp_path, trainable=True)
    assert [one for one, _ in laid.named_parameters() if "lora_" in one] == [A, B]
    assert torch.equal(outputs(laid, name), wanted)
    theirs = peft.PeftModel.from_pretrained(made(name), tmp_path).eval()
    torch.testing.assert_close(outputs(theirs, name), wanted, **near(wanted))


@each_model
def test_a_merge_changes_it_once_live_and_on_files_and_is_undone(name: str, tmp_path: Path) -> None:
    ours = trained(name)
    surgery.save(ours, tmp_path / "adapter")
    made(name).save_pretrained(tmp_path / "base")
    wanted = outputs(ours, name)
    surgery.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", reversible=True)
    surgery.verify_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out").require()
    assert hashes(tmp_path / "out" / WEIGHTS).keys() == hashes(tmp_path / "base" / WEIGHTS).keys()
    merged = type(made(name)).from_pretrained(tmp_path / "out").eval()
    assert len({merged.get_submodule(one).weight.data_ptr() for one in tied_names(merged)}) == 1
    # The grid of 22 bits costs r * 2^-21 of each product, r = 2, in place of float32's rounding of it.
    torch.testing.assert_close(outputs(merged, name), wanted, **near(wanted, 2 * 2.0**-21))
    held = {one: values.clone() for one, values in ours.state_dict().items()}
    surgery.save_merged(ours, tmp_path / "live")
    assert hashes(tmp_path / "live" / WEIGHTS) == hashes(tmp_path / "out" / WEIGHTS)
    surgery.unmerge(surgery.merge(ours))
    assert all(torch.equal(values, held[one]) for one, values in ours.state_dict().items())
    kept = surgery.eject(surgery.merge(ours), keep_merged=True)
    assert torch.equal(outputs(kept, name), outputs(merged, name))
    surgery.unmerge_checkpoint(tmp_path / "out", tmp_path / "back")
    assert (tmp_path / "back" / WEIGHTS).read_bytes() == (tmp_path / "base" / WEIGHTS).read_bytes()


@pytest.mark.parametrize("name", ["t5", "t5's encoder", "bart"])
def test_copies_of_the_base_s_own_that_peft_saves_say_nothing(name: str, tmp_path: Path) -> None:
    surgery.save(trained(name), tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(made(name), tmp_path / "ours").eval()
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=True)
    assert any(one.endswith("shared.base_layer.weight") for one in load_file(tmp_path / "theirs" / ADAPTER))
    made(name).save_pretrained(tmp_path / "base")
    for one in ("ours", "theirs"):
        surgery.merge_checkpoint(tmp_path / "base", tmp_path / one, tmp_path / f"{one} merged")
    assert hashes(tmp_path / "theirs merged" / WEIGHTS) == hashes(tmp_path / "ours merged" / WEIGHTS)


@pytest.mark.parametrize("name", ["t5", "t5 without the scale", "mbart"])
def test_files_that_hold_each_name_or_some_are_merged_to_the_same_model(name: str, tmp_path: Path) -> None:
    ours = trained(name)
    surgery.save(ours, tmp_path / "adapter")
    base = tmp_path / "base"
    made(name).save_pretrained(base)
    once = load_file(base / WEIGHTS)
    names = [f"{one}.weight" for one in tied_names(made(name))]
    own = next(one for one in names if one in once)
    for kept in (names, [own, names[-1]], names[:-1]):
        save_file(once | {one: once[own].clone() for one in kept}, base / WEIGHTS, {"format": "pt"})
        out = tmp_path / f"{len(kept)} {kept[-1]}"
        if kept == names[:-1]:  # the head alone is absent, and two embeddings may be what it is
            with pytest.raises(surgery.MatchError, match=r"lm_head: it is tied to (model\.)?shared\.weight"):
                surgery.merge_checkpoint(base, tmp_path / "adapter", out)
            continue
        surgery.merge_checkpoint(base, tmp_path / "adapter", out)
        merged = load_file(out / WEIGHTS)
        assert all(torch.equal(merged[one], merged[own]) for one in kept)
        loaded = type(made(name)).from_pretrained(out).eval()
        wanted = outputs(ours, name)
        torch.testing.assert_close(outputs(loaded, name), wanted, **near(wanted, 2 * 2.0**-21))


PARTS = {
    "shared, which runs nowhere": ["shared"],
    "the head": ["lm_head"],
    "both embeddings": ["embed_tokens"],
    "all, each by itself": ["shared", "embed_tokens", "lm_head"],
}


@pytest.mark.parametrize("targets", PARTS.values(), ids=PARTS.keys())
@pytest.mark.parametrize("name", ["t5", "bart", "marian"])
def test_what_is_not_the_same_for_all_runs_as_peft_runs_it_and_is_not_merged(
    name: str, targets: list[str], tmp_path: Path
) -> None:
    torch.manual_seed(1)
    config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    theirs = peft.get_peft_model(made(name), config).eval()
    theirs.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    ours = surgery.load(made(name), tmp_path / "adapter")
    wanted = outputs(theirs, name)
    torch.testing.assert_close(outputs(ours, name), wanted, **near(wanted))
    made(name).save_pretrained(tmp_path / "base")
    told = "has not the same for each" if len(targets) == 3 else r"leaves .* alone"
    for tied in ("refuse", "untie"):
        with pytest.raises(surgery.MatchError, match=rf"shared\.weight: in the model it is .* too, and .*: it {told}"):
            surgery.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", tied=tied)
    with pytest.raises(surgery.MatchError, match="is tied to"):
        surgery.merge(ours)


@pytest.mark.parametrize("name", ["t5", "t5's encoder", "bart"])
def test_a_merge_as_peft_is_refused_for_that_counts_each(name: str, tmp_path: Path) -> None:
    surgery.save(trained(name), tmp_path / "adapter")
    made(name).save_pretrained(tmp_path / "base")
    with pytest.raises(surgery.ConfigError, match="tied weights twice"):
        surgery.merge(surgery.load(made(name), tmp_path / "adapter"), arithmetic="peft")
    with pytest.raises(surgery.ConfigError, match="tied weights twice"):
        surgery.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", arithmetic="peft")


def test_two_adapters_over_all_are_both_merged_and_one_beside_that_is_not_is_refused(tmp_path: Path) -> None:
    for seed, folder in enumerate("ab"):
        surgery.save(trained("t5", seed=seed), tmp_path / folder)
    alone = surgery.LoraConfig(r=2, target_modules=["shared"], init_lora_weights=False)
    surgery.save(surgery.inject(made("t5"), alone), tmp_path / "alone")
    made("t5").save_pretrained(tmp_path / "base")
    model = surgery.load(made("t5"), tmp_path / "a", adapter_name="a")
    surgery.load(model, tmp_path / "b", adapter_name="b")
    surgery.set_adapter(model, ["a", "b"])
    wanted = outputs(model, "t5")
    surgery.merge_checkpoint(tmp_path / "base", [tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    merged = T5ForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(outputs(merged, "t5"), wanted, **near(wanted, 4 * 2.0**-21))
    assert torch.equal(outputs(surgery.merge(model), "t5"), outputs(merged, "t5"))
    with pytest.raises(surgery.MatchError, match=r"alone adapts shared: it leaves encoder\.embed_tokens, .* alone"):
        surgery.merge_checkpoint(tmp_path / "base", [tmp_path / "a", tmp_path / "alone"], tmp_path / "2")


@pytest.mark.parametrize("method", ["cat", "svd", "linear", "dare_ties"])
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_a_combination_stays_tied(name: str, method: str, tmp_path: Path) -> None:
    folders = [tmp_path / one for one in "ab"]
    for seed, folder in enumerate(folders):
        surgery.save(trained(name, seed=seed), folder)
    options = {} if method in {"cat", "linear"} else {"rank": 3} if method == "svd" else {"density": 0.5}
    report = surgery.combine([(folders[0], 0.5), (folders[1], 0.25)], tmp_path / "sum", method=method, **options)
    assert {*report.sites} == {*tied_names(made(name))}
    laid = surgery.load(made(name), tmp_path / "sum")
    assert len([one for one, _ in laid.named_parameters() if "lora_" in one]) == 2
    made(name).save_pretrained(tmp_path / "base")
    surgery.merge_checkpoint(tmp_path / "base", tmp_path / "sum", tmp_path / "out")
    merged = type(made(name)).from_pretrained(tmp_path / "out").eval()
    wanted = outputs(laid, name)
    torch.testing.assert_close(outputs(merged, name), wanted, **near(wanted, 4 * 2.0**-21))


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=str)
@pytest.mark.parametrize("other", ["t5 without a head", "t5's encoder"])
def test_adapters_that_tie_other_modules_are_not_combined(other: str, order: tuple[int, ...], tmp_path: Path) -> None:
    names = ["t5", other]
    for seed, name in enumerate(names):
        surgery.save(trained(name, seed=seed), tmp_path / str(seed))
        (tmp_path / str(seed) / "surgery.base.json").unlink(missing_ok=True)  # which may tell the bases apart before
    tied = [", ".join(sorted(tied_names(made(names[one])))) for one in order]
    first, second = (tmp_path / str(one) for one in order)
    found = rf"{second.name}: it ties {tied[1]}, and \S*{first.name} ties {tied[0]};"
    with pytest.raises(surgery.InputError, match=found):
        surgery.combine([first, second], tmp_path / "sum")
    assert not (tmp_path / "sum").exists()


@each_model
def test_what_is_extracted_of_it_is_for_every_module(name: str, tmp_path: Path) -> None:
    made(name).save_pretrained(tmp_path / "base")
    other = made(name)
    torch.manual_seed(4)
    with torch.no_grad():
        embedding = other.get_input_embeddings().weight
        embedding.add_(torch.randn(29, 2) @ torch.randn(2, 16) / 8)
    other.save_pretrained(tmp_path / "tuned")
    report = surgery.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "adapter", rank=2)
    missed = math.hypot(*(one.error_norm for one in report.sites.values()))
    assert missed <= EPS / 2 * float(embedding.norm()) + 8 * EPS * next(iter(report.sites.values())).exact_norm
    wanted = outputs(other, name)
    ours = surgery.load(made(name), tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(made(name), tmp_path / "adapter").eval()
    surgery.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    merged = type(made(name)).from_pretrained(tmp_path / "out").eval()
    for model in (ours, theirs, merged):
        torch.testing.assert_close(outputs(model, name), wanted, **near(wanted, 2 * 2.0**-21))


@pytest.mark.parametrize("name", ["t5", "t5 without a head"])
def test_it_is_not_saved_whole_beside_what_is_extracted(name: str, tmp_path: Path) -> None:
    other = made(name)
    with torch.no_grad():
        other.shared.weight.mul_(2)
        other.encoder.block[0].layer[0].SelfAttention.q.weight.mul_(2)
    made(name).save_pretrained(tmp_path / "base")
    other.save_pretrained(tmp_path / "tuned")
    folders, options = (tmp_path / "base", tmp_path / "tuned", tmp_path / "out"), {"rank": 2, "targets": ["q"]}
    with pytest.raises(surgery.MatchError, match=r"shared\.weight: it is encoder\.embed_tokens, .* too"):
        surgery.extract(*folders, **options, rest="save")
    assert surgery.extract(*folders, **options, rest="drop").dropped == ["shared"]
