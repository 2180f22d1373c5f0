"""How adapters are spelled in Python: a path, a path with its weight, or several; all else is refused by name."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_folders import SHAPES, SITES, factors, file_hashes, llama_base, write_adapter

import surgery

TAKERS: dict[str, Callable[[Path, Any, Path], Any]] = {
    "plan": lambda base, given, _: surgery.plan(base, given),
    "merge_checkpoint": surgery.merge_checkpoint,
    "verify_checkpoint": lambda base, given, _: surgery.verify_checkpoint(base, given, base),
    "combine": lambda _, given, out: surgery.combine(given, out),
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return llama_base(tmp_path / "base")


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "adapter")


@pytest.mark.parametrize("taker", TAKERS)
def test_a_pair_alone_is_one_adapter_with_its_weight(taker: str, base: Path, adapter: Path, tmp_path: Path) -> None:
    alone, listed = (
        TAKERS[taker](base, given, tmp_path / "of" / str(at) / "out")
        for at, given in enumerate([(str(adapter), 0.5), [(adapter, 0.5)]])
    )
    written = [file_hashes(tmp_path / "of" / str(at)) for at in range(2)] if (tmp_path / "of").exists() else [0, 0]
    assert written[0] == written[1]
    assert alone.summary().replace("of/0", "of/1") == listed.summary()


@pytest.mark.parametrize("taker", TAKERS)
@pytest.mark.parametrize("given", [5, None, [None], [3.0], [("a", "b", "c")], {"a": 1.0}, [["a", None]]], ids=repr)
def test_what_names_no_adapter_is_refused_with_the_forms(taker: str, given: Any, base: Path, tmp_path: Path) -> None:
    if taker == "verify_checkpoint" and given is None:
        given = [None]  # as if it were left out
    with pytest.raises(surgery.UsageError, match="is wanted"):
        TAKERS[taker](base, given, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("file", ["", "adapter_model.safetensors"])
def test_an_adapter_in_place_of_the_base_is_refused_as_one(
    file: str, base: Path, adapter: Path, tmp_path: Path
) -> None:
    with pytest.raises(surgery.InputError, match="it is an adapter; a model is wanted"):
        surgery.merge_checkpoint(adapter / file, adapter, tmp_path / "out")
    for name in ("adapter_config.json", "adapter_model.safetensors"):  # a model with an adapter beside it is a base
        (base / name).write_bytes((adapter / name).read_bytes())
    assert surgery.plan(base, adapter).ok


def test_a_verification_of_half_a_merge_is_refused(base: Path, adapter: Path) -> None:
    for given in ({"adapters": adapter}, {"out": base}):
        with pytest.raises(surgery.UsageError, match="one of adapters and OUT is missing"):
            surgery.verify_checkpoint(base, **given)
    for asked in ({"ops": {"q_proj": "linear"}}, {"probes": 3}, {"arithmetic": "peft"}, {"compute_dtype": "float16"}):
        with pytest.raises(surgery.UsageError, match=f"verify: `{min(asked)}` given, .*; name base and adapters too"):
            surgery.verify_checkpoint(base, **asked)


@pytest.mark.parametrize("bad", [torch.nan, -torch.inf])
def test_factors_that_are_no_numbers_are_in_the_plan_and_nothing_is_begun(
    bad: float, base: Path, tmp_path: Path
) -> None:
    tensors = factors()
    for site, role in ((SITES[0], "A"), (SITES[3], "B")):
        tensors[f"{site}.lora_{role}.weight"][1, 1] = bad
    adapter = write_adapter(tmp_path / "adapter", tensors)
    told = [str(one) for one in surgery.plan(base, adapter).refusals]
    assert [site in line and f"{role} holds NaN or infinity" in line for site, role, line in
            zip((SITES[0], SITES[3]), "AB", told, strict=True)] == [True, True]  # fmt: skip
    calls: list[Any] = []
    with pytest.raises(surgery.ValueRangeError, match=r"A holds NaN or infinity.*and 1 more"):
        surgery.merge_checkpoint(base, adapter, tmp_path / "out", progress=calls.append)
    assert calls == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_a_weight_of_the_adapter_that_is_no_number_is_told_as_the_adapters(base: Path, tmp_path: Path) -> None:
    head = torch.full(SHAPES["lm_head"], torch.nan)
    adapter = write_adapter(tmp_path / "adapter", factors() | {"lm_head.weight": head}, modules_to_save=["lm_head"])
    with pytest.raises(
        surgery.ValueRangeError, match=r"lm_head\.weight: the weight that the adapter brings.*the adapter,"
    ):
        surgery.merge_checkpoint(base, adapter, tmp_path / "out")


def test_files_beside_an_adapter_s_own_that_look_like_it_are_told_as_unread(base: Path, adapter: Path) -> None:
    assert not [note for note in surgery.plan(base, adapter).notes if "not read" in note]
    for name in ("adapter_model-2.safetensors", "adapter_model.bin", "adapter_model.md", "optimizer.pt"):
        (adapter / name).write_bytes(b"")
    (note,) = [note for note in surgery.plan(base, adapter).notes if "not read" in note]
    told = "adapter_model-2.safetensors, adapter_model.bin beside adapter_model.safetensors: not read"
    assert note == f"{adapter}: {told}"
