"""Shards of another size, other prefixes, square weights, expected hashes: what is written, and what is refused."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from checkpoint_folders import (
    base_tensors,
    factors,
    file_hashes,
    read_tensors,
    tensor_hashes,
    write_adapter,
    write_base,
)
from safetensors.torch import load_file, save_file

import surgery
from surgery.core.names import prefix_between
from surgery.core.site import TensorInfo
from surgery.hosts.checkpoint import Checkpoint
from surgery.hosts.layout import bytes_of
from surgery.io.fingerprint import base_print_bytes
from surgery.io.weight_files import INDEX
from surgery.procedures.planning.true_config import Outcome, true_config

SQUARE = ("model.layers.0.q_proj", "model.layers.1.q_proj")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_base(tmp_path / "base", base_tensors(torch.bfloat16), shards=2, config={"model_type": "llama"})


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "adapter")


@pytest.mark.parametrize("size", ["1B", "150B", "0.2KB", "5GB"])
def test_shards_of_another_size_hold_the_same_tensors(
    size: int | str, base: Path, adapter: Path, tmp_path: Path
) -> None:
    like = surgery.merge_checkpoint(base, adapter, tmp_path / "like")
    cut = surgery.merge_checkpoint(base, adapter, tmp_path / "cut", max_shard_size=size, reversible=True)
    assert tensor_hashes(read_tensors(tmp_path / "cut")) == tensor_hashes(read_tensors(tmp_path / "like"))
    assert cut.receipt["base"] == like.receipt["base"]
    assert {k: v["sha256"] for k, v in cut.receipt["changed"].items()} == {
        k: v["sha256"] for k, v in like.receipt["changed"].items()
    }
    largest = bytes_of(size, "max_shard_size")
    files = sorted((tmp_path / "cut").glob("*.safetensors"))
    held = [load_file(path) for path in files]
    assert largest is not None
    assert all(len(one) == 1 or sum(v.nbytes for v in one.values()) <= largest for one in held)
    assert len(files) == (1 if size == "5GB" else 9 if size == "1B" else len(files))
    assert (tmp_path / "cut" / INDEX).exists() is (len(files) > 1)
    with Checkpoint(tmp_path / "cut") as found:  # headers and index agree
        assert len(found.at) == 9
    surgery.unmerge_checkpoint(tmp_path / "cut", tmp_path / "back")
    assert file_hashes(tmp_path / "back") == file_hashes(base)


@pytest.mark.parametrize("size", ["0", "-5", "5 apples", "GB", "", "1e9", 0, "9" * 30, "5", 5, "4095"])
def test_a_size_that_is_none_is_a_usage_error(size: int | str) -> None:
    with pytest.raises(surgery.UsageError, match="max_shard_size"):
        bytes_of(size, "max_shard_size")


def test_units_are_of_a_thousand_or_of_1024() -> None:
    assert [
        bytes_of(size, "max_shard_size") for size in (4096, "4096", "7 b", "5GB", "1.5 kb", "2MiB", "1k", None)
    ] == [
        *(4096, 4096, 7, 5_000_000_000, 1500, 2 << 20, 1000, None),
    ]


@pytest.mark.parametrize("prefix", ["base.", "", "model.language_model.", "other.model."])
def test_one_prefix_may_differ(prefix: str, base: Path, adapter: Path, tmp_path: Path) -> None:
    named = {prefix + name.removeprefix("model."): values for name, values in factors().items()}
    other = write_adapter(tmp_path / "other", named)
    surgery.merge_checkpoint(base, adapter, tmp_path / "one")
    surgery.merge_checkpoint(base, other, tmp_path / "two")
    assert tensor_hashes(read_tensors(tmp_path / "one")) == tensor_hashes(read_tensors(tmp_path / "two"))


KNOWN = {f"{tower}.layers.{i}.q" for tower, count in (("text.model", 4), ("vision", 3)) for i in range(count)}
PREFIXES = {
    "the same": (["text.model.layers.0.q"], ("", "")),
    "removed": (["x.text.model.layers.0.q"], ("x.", "")),
    "added": (["model.layers.0.q"], ("", "text.")),
    "in two towers": (["layers.0.q"], None),
    "replaced": (["lm.model.layers.0.q", "lm.model.layers.3.q"], ("lm.", "text.")),
    "replaced, and in two towers": (["lm.layers.0.q"], None),
    "another layer": (["text.model.layers.4.q"], None),
    "another layer of another tower": (["lm.model.layers.4.q"], None),
    "two prefixes": (["a.text.model.layers.0.q", "b.text.model.layers.1.q"], None),
}


@pytest.mark.parametrize(("wanted", "found"), PREFIXES.values(), ids=PREFIXES.keys())
def test_a_prefix_is_found_only_if_it_is_the_one(wanted: list[str], found: tuple[str, str] | None) -> None:
    assert prefix_between(wanted, KNOWN) == found


TWICE = {
    "one site by two names": {"model.layers.0.q_proj", "layers.0.q_proj"},
    "one site by two prefixes": {"a.layers.0.q_proj", "b.layers.0.q_proj"},
}


@pytest.mark.parametrize("sites", TWICE.values(), ids=TWICE.keys())
def test_two_names_of_one_site_are_refused(sites: set[str], tmp_path: Path) -> None:
    """Of the two one would be lost."""
    base = write_base(tmp_path / "base", {"layers.0.q_proj.weight": torch.randn(6, 6)}, config={"model_type": "llama"})
    named = {f"{site}.lora_{role}.weight": torch.randn(4, 6) if role == "A" else torch.randn(6, 4) for site in sites
             for role in "AB"}  # fmt: skip
    adapter = write_adapter(tmp_path / "adapter", named)
    with pytest.raises(surgery.InputError):
        surgery.merge_checkpoint(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("keys", [("lm_head.weight", "base_model.model.lm_head.weight"),
                                  ("model.embed_tokens.weight", "model.embed_tokens.base_layer.weight")])  # fmt: skip
def test_two_tensors_of_one_name_are_refused(keys: tuple[str, str], base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", modules_to_save=["lm_head"])
    file = adapter / "adapter_model.safetensors"
    both = {key: torch.randn(11, 6) for key in keys}
    save_file(load_file(file) | both, file)
    with pytest.raises(surgery.FormatError, match="two tensors are"):
        surgery.merge_checkpoint(base, adapter, tmp_path / "out")


def test_weights_of_both_layouts_are_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    surgery.merge_checkpoint(base, adapter, out)
    save_file({"a": torch.zeros(1)}, out / "model.safetensors")
    with pytest.raises(surgery.FormatError, match=r"both model\.safetensors and"):
        surgery.merge_checkpoint(out, adapter, tmp_path / "next")


def test_a_stray_file_of_weights_is_different(base: Path, adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    surgery.merge_checkpoint(base, adapter, out)
    save_file({"a": torch.zeros(1)}, out / "extra.safetensors")
    assert not surgery.verify_checkpoint(out).ok


def test_weights_that_an_adapter_calls_a_tokenizer_are_not_carried(base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter")
    for name in ("tokenizer.safetensors", "tokenizer.bin", "tokenizer.json"):
        (adapter / name).write_bytes(b"{}")
    surgery.merge_checkpoint(base, adapter, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").glob("tokenizer*")] == ["tokenizer.json"]


def test_a_config_that_ties_what_was_written_apart_is_different(tmp_path: Path) -> None:
    tensors = {"model.embed_tokens.weight": torch.randn(11, 6)}
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True}
    base = write_base(tmp_path / "base", tensors, config=config)
    named = {"lm_head.lora_A.weight": torch.randn(4, 6), "lm_head.lora_B.weight": torch.randn(11, 4)}
    adapter = write_adapter(tmp_path / "adapter", named, target_modules=["lm_head"])
    surgery.merge_checkpoint(base, adapter, tmp_path / "out", tied="untie")
    assert surgery.verify_checkpoint(base, adapter, tmp_path / "out").ok
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    report = surgery.verify_checkpoint(base, adapter, tmp_path / "out")
    assert "tie_word_embeddings" in report.tensors["config.json"].why


def test_a_square_weight_within_a_model_of_two_families(tmp_path: Path) -> None:
    config = {"model_type": "vision-encoder-decoder", "decoder": {"model_type": "gpt2"}}
    base = write_base(tmp_path / "base", {"decoder.h.0.c_proj.weight": torch.randn(6, 6)}, config=config)
    A, B = torch.randn(4, 6), torch.randn(6, 4)
    named = {"decoder.h.0.c_proj.lora_A.weight": A, "decoder.h.0.c_proj.lora_B.weight": B}
    adapter = write_adapter(tmp_path / "adapter", named, target_modules=["c_proj"], fan_in_fan_out=False)
    assert [change.site.acting.name for change in surgery.plan(base, adapter).changes] == ["conv1d"]


def test_a_square_weight_is_refused_where_its_neighbours_are_transposed(tmp_path: Path) -> None:
    """The family is not one that is known to have them, and fan_in_fan_out denies it."""
    tensors = {"h.0.c_proj.weight": torch.randn(6, 6), "h.0.c_fc.weight": torch.randn(6, 10)}
    base = write_base(tmp_path / "base", tensors, config={"model_type": "new"})
    named = {"h.0.c_proj.lora_A.weight": torch.randn(4, 6), "h.0.c_proj.lora_B.weight": torch.randn(6, 4)}
    named |= {"h.0.c_fc.lora_A.weight": torch.randn(4, 6), "h.0.c_fc.lora_B.weight": torch.randn(10, 4)}
    adapter = write_adapter(tmp_path / "adapter", named, target_modules=["c_proj", "c_fc"], fan_in_fan_out=False)
    with pytest.raises(surgery.MatchError, match="`ops` c_proj=conv1d"):
        surgery.merge_checkpoint(base, adapter, tmp_path / "out")


def test_a_square_weight_of_an_unknown_family_is_refused_where_the_config_says_conv1d(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", base_tensors(torch.float32), config={"model_type": "new"})
    adapter = write_adapter(tmp_path / "adapter", factors(SQUARE), fan_in_fan_out=True, target_modules=["q_proj"])
    with pytest.raises(surgery.MatchError, match="`ops` q_proj=conv1d"):
        surgery.merge_checkpoint(base, adapter, tmp_path / "out")
    out = {}
    for op in ("linear", "conv1d"):
        surgery.merge_checkpoint(base, adapter, tmp_path / op, ops={"q_proj": op})
        out[op] = read_tensors(tmp_path / op)
    before = base_tensors(torch.float32)
    for name in (f"{site}.weight" for site in SQUARE):
        change = {op: tensors[name] - before[name] for op, tensors in out.items()}
        assert not torch.equal(out["linear"][name], out["conv1d"][name])
        # each is off by a rounding of the sum, whose size the weights tell
        unit = torch.finfo(torch.float32).eps * (before[name].abs().max() + change["linear"].abs().max())
        assert (change["linear"] - change["conv1d"].T).abs().max() <= 2 * unit


def test_an_op_that_is_none_is_a_usage_error(base: Path, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(surgery.UsageError):
        surgery.merge_checkpoint(base, adapter, tmp_path / "out", ops={"q_proj": "conv2d"})


def test_the_expected_base_and_adapter_pass_and_others_are_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    receipt = surgery.merge_checkpoint(base, adapter, tmp_path / "one").receipt
    sha256 = receipt["base"]["fingerprint"]
    digest = surgery.inspect(adapter).sha256
    right = {"expect_base_sha256": sha256.upper(), "expect_adapter_sha256": digest}
    surgery.merge_checkpoint(base, adapter, tmp_path / "two", **right)
    for wrong in ({"expect_base_sha256": digest}, {"expect_adapter_sha256": sha256}):
        with pytest.raises(surgery.InputError, match="expected is"):
            surgery.merge_checkpoint(base, adapter, tmp_path / "three", **wrong)
        assert not (tmp_path / "three").exists()
    with pytest.raises(surgery.UsageError):
        surgery.merge_checkpoint(base, adapter, tmp_path / "three", expect_adapter_sha256=[digest, digest])


def test_the_fingerprint_of_a_base_knows_no_shards(base: Path, tmp_path: Path) -> None:
    whole = write_base(tmp_path / "whole", base_tensors(torch.bfloat16))
    other = write_base(tmp_path / "other", base_tensors(torch.bfloat16, seed=1))
    found = [surgery.inspect(path, sha256=True).sha256 for path in (base, whole, other)]
    assert found[0] == found[1] != found[2]
    assert surgery.inspect(base).sha256 is None  # headers alone are read


def test_an_adapter_refuses_another_base_of_the_same_shapes(tmp_path: Path) -> None:
    def model(seed: int) -> torch.nn.Module:
        torch.manual_seed(seed)
        return torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))

    config = surgery.LoraConfig(r=2, target_modules=["1"], init_lora_weights=False)
    surgery.save(surgery.inject(model(0), config), tmp_path / "adapter")
    bases = [write_base(tmp_path / f"base{seed}", model(seed).state_dict()) for seed in (0, 1)]
    surgery.merge_checkpoint(bases[0], tmp_path / "adapter", tmp_path / "out")
    surgery.load(model(0), tmp_path / "adapter")
    with pytest.raises(surgery.InputError, match="trained on another base"):
        surgery.merge_checkpoint(bases[1], tmp_path / "adapter", tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()
    with pytest.raises(surgery.InputError, match="trained on another base"):
        surgery.load(model(1), tmp_path / "adapter")
    surgery.load(model(1).double(), tmp_path / "adapter")  # of another dtype nothing can be said


def test_another_base_is_refused_where_the_adapter_has_a_tied_head_too(tmp_path: Path) -> None:
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}

    def tensors(seed: int) -> dict[str, torch.Tensor]:
        return {name: one for name, one in base_tensors(torch.float32, seed).items() if name != "lm_head.weight"}

    bases = [write_base(tmp_path / f"base{seed}", tensors(seed), config=config) for seed in (0, 1)]
    sites = ("model.layers.0.q_proj", "lm_head")
    adapter = write_adapter(tmp_path / "adapter", factors(sites), target_modules=["q_proj", "lm_head"])
    held = {
        f"{site}.weight": tensors(0).get(f"{site}.weight", tensors(0)["model.embed_tokens.weight"]) for site in sites
    }
    told = {
        name: (TensorInfo(name, one.dtype, tuple(one.shape)), hashlib.sha256(one.numpy().tobytes()).hexdigest())
        for name, one in held.items()
    }
    (adapter / "surgery.base.json").write_bytes(base_print_bytes(told))
    surgery.merge_checkpoint(bases[0], adapter, tmp_path / "out", tied="untie")
    with pytest.raises(surgery.InputError, match="trained on another base"):
        surgery.merge_checkpoint(bases[1], adapter, tmp_path / "wrong", tied="untie")


def test_a_merged_base_is_saved_as_it_was_before(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    config = surgery.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    surgery.save(surgery.inject(model, config), tmp_path / "before")
    surgery.save(surgery.merge(model), tmp_path / "merged")
    assert file_hashes(tmp_path / "before") == file_hashes(tmp_path / "merged")


def test_the_vocabulary_is_told_where_the_config_told_it() -> None:
    found = true_config({"llm_config": {"vocab_size": 11}}, None, Outcome(vocab_size=13))
    assert found == {"llm_config": {"vocab_size": 13}}


def test_a_nested_config_tells_the_truth_too() -> None:
    inner = {"vocab_size": 10, "dtype": "float32", "tie_word_embeddings": True}
    config = {"model_type": "x", "text_config": inner, "vision_config": {"dtype": "float32"}}
    found = true_config(config, torch.bfloat16, Outcome(vocab_size=12, untied=True))
    told = {"vocab_size": 12, "dtype": "bfloat16", "tie_word_embeddings": False}
    assert found == config | {"text_config": told, "dtype": "bfloat16", "tie_word_embeddings": False}
    assert true_config(config, None, Outcome()) is None


def test_an_op_of_no_site_is_refused_with_the_nearest(base: Path, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(surgery.MatchError, match=r"^`ops` q_prj: no site .*nearest: q_proj.*; name one") as raised:
        surgery.merge_checkpoint(base, adapter, tmp_path / "out", ops={"q_prj": "linear"})
    assert raised.value.exit_code == 3


def test_ops_of_a_receipt_that_name_no_site_refuse_the_receipt_and_not_the_call(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    surgery.merge_checkpoint(base, adapter, out, ops={"q_proj": "linear"})
    path = out / "surgery.receipt.json"
    path.write_text(path.read_text().replace('"q_proj": "linear"', '"c_proj": "linear"'))
    with pytest.raises(surgery.InputError, match=r"^`ops` c_proj: no site") as raised:
        surgery.verify_checkpoint(base, adapter, out)
    assert raised.value.exit_code == 3
    assert raised.value.__notes__ == ["ops c_proj=linear as the receipt tells"]
    assert surgery.verify_checkpoint(base, adapter, out, ops={"q_proj": "linear"}).ok
