"""Shards of another size, other prefixes, square weights, expected hashes: what is written, and what is refused."""

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
from safetensors.torch import load_file

import surgery
from surgery.core.names import prefix_between
from surgery.hosts.checkpoint import INDEX, Checkpoint
from surgery.hosts.layout import shard_bytes
from surgery.procedures.true_config import Outcome, true_config

SQUARE = ("model.layers.0.q_proj", "model.layers.1.q_proj")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_base(tmp_path / "base", base_tensors(torch.bfloat16), shards=2, config={"model_type": "llama"})


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "adapter")


@pytest.mark.parametrize("size", [1, 150, "0.2KB", "5GB"])
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
    largest = shard_bytes(size)
    files = sorted((tmp_path / "cut").glob("*.safetensors"))
    held = [load_file(path) for path in files]
    assert largest is not None
    assert all(len(one) == 1 or sum(v.nbytes for v in one.values()) <= largest for one in held)
    assert len(files) == (1 if size == "5GB" else 9 if size == 1 else len(files))
    assert (tmp_path / "cut" / INDEX).exists() is (len(files) > 1)
    with Checkpoint(tmp_path / "cut") as found:  # headers and index agree
        assert len(found.at) == 9
    surgery.unmerge_checkpoint(tmp_path / "cut", tmp_path / "back")
    assert file_hashes(tmp_path / "back") == file_hashes(base)


@pytest.mark.parametrize("size", ["0", "-5", "5 apples", "GB", "", "1e9", 0, "9" * 30])
def test_a_size_that_is_none_is_a_usage_error(size: int | str) -> None:
    with pytest.raises(surgery.UsageError, match="max_shard_size"):
        shard_bytes(size)


def test_units_are_of_a_thousand_or_of_1024() -> None:
    assert [shard_bytes(size) for size in (7, "7", "5GB", "1.5 kb", "2MiB", "1k", None)] == [
        *(7, 7, 5_000_000_000, 1500, 2 << 20, 1000, None),
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


def test_a_square_weight_of_an_unknown_family_is_refused_where_the_config_says_conv1d(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", base_tensors(torch.float32), config={"model_type": "new"})
    adapter = write_adapter(tmp_path / "adapter", factors(SQUARE), fan_in_fan_out=True, target_modules=["q_proj"])
    with pytest.raises(surgery.MatchError, match="--op q_proj=conv1d"):
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


@pytest.mark.parametrize("ops", [{"q_proj": "conv2d"}, {"nothing": "linear"}])
def test_an_op_that_is_none_or_names_no_site_is_a_usage_error(
    ops: dict[str, str], base: Path, adapter: Path, tmp_path: Path
) -> None:
    with pytest.raises(surgery.UsageError):
        surgery.merge_checkpoint(base, adapter, tmp_path / "out", ops=ops)


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


def test_a_merged_base_is_saved_as_it_was_before(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    config = surgery.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    surgery.save(surgery.inject(model, config), tmp_path / "before")
    surgery.save(surgery.merge(model), tmp_path / "merged")
    assert file_hashes(tmp_path / "before") == file_hashes(tmp_path / "merged")


def test_a_nested_config_tells_the_truth_too() -> None:
    inner = {"vocab_size": 10, "dtype": "float32", "tie_word_embeddings": True}
    config = {"model_type": "x", "text_config": inner, "vision_config": {"dtype": "float32"}}
    found = true_config(config, torch.bfloat16, Outcome(vocab_size=12, untied=True))
    told = {"vocab_size": 12, "dtype": "bfloat16", "tie_word_embeddings": False}
    assert found == config | {"text_config": told, "dtype": "bfloat16", "tie_word_embeddings": False}
    assert true_config(config, None, Outcome()) is None
