"""Each command does what its Python function does, and tells the same facts as a table and as JSON."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_folders import (
    SITES,
    base_tensors,
    factors,
    file_hashes,
    read_tensors,
    write_adapter,
    write_base,
)
from outcomes import Outcome, Run, parsed, rows, told

import surgery

RECEIPT = "surgery.receipt.json"


def test_inspect_lists_each_site_of_a_model(run: Run, base: Path) -> None:
    listed, data = run("inspect", base), parsed(run("inspect", base, "--json"))
    assert listed.code == 0
    assert data == surgery.inspect(base).to_json()
    assert {row["name"]: row["shape"] for row in data["rows"] if row["op"] == "linear"} == {
        name.removesuffix(".weight"): list(values.shape)
        for name, values in base_tensors(torch.bfloat16).items()
        if values.dim() == 2 and "embed" not in name
    }
    for row, cells in zip(data["rows"], rows(listed), strict=False):
        wanted = [row["name"], row["op"], "x".join(map(str, row["shape"])), row["dtype"], str(row["size_bytes"])]
        assert cells == [cell for cell in wanted if cell]
    assert listed.out.splitlines()[-1] == "model: 8 sites, 702 bytes"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_inspect_of_a_single_file_lists_what_inspect_of_its_folder_lists(
    dtype: torch.dtype, run: Run, tmp_path: Path
) -> None:
    folder = write_base(tmp_path / "model", base_tensors(dtype))
    of_file = run("inspect", folder / "model.safetensors")
    assert of_file == run("inspect", folder)
    assert str(dtype).removeprefix("torch.") in of_file.out
    assert parsed(run("inspect", folder / "model.safetensors", "--json")) == parsed(run("inspect", folder, "--json"))


def test_inspect_lists_each_tensor_of_an_adapter(run: Run, adapter: Path) -> None:
    listed, data = run("inspect", adapter), parsed(run("inspect", adapter, "--json"))
    assert data["kind"] == "adapter"
    assert data["config"] == json.loads((adapter / "adapter_config.json").read_text())
    wanted = {
        name.replace(".lora_", " ").removesuffix(".weight"): list(values.shape) for name, values in factors().items()
    }
    assert {row["name"]: row["shape"] for row in data["rows"]} == wanted
    assert {cells[0]: cells[1] for cells in rows(listed)[:-1]} == {k: "x".join(map(str, v)) for k, v in wanted.items()}
    assert run("inspect", adapter / "adapter_model.safetensors") == listed


def test_inspect_lists_the_modules_to_save_of_an_adapter_too(run: Run, tmp_path: Path) -> None:
    tensors = factors() | {"lm_head.weight": torch.ones(11, 6)}
    adapter = write_adapter(tmp_path / "saved", tensors, modules_to_save=["lm_head"])
    data = parsed(run("inspect", adapter, "--json"))
    assert len(data["rows"]) == len(tensors)
    assert any("lm_head" in row["name"] for row in data["rows"])


def test_inspect_says_that_an_embedding_is_the_output_head_too(run: Run, tmp_path: Path) -> None:
    tensors = base_tensors(torch.float32)
    del tensors["lm_head.weight"]
    folder = write_base(tmp_path / "tied", tensors, config={"architectures": ["LlamaForCausalLM"]})
    found = next(cells for cells in rows(run("inspect", folder)) if cells[0] == "model.embed_tokens")
    assert found[-1] == "output head"


@pytest.mark.parametrize("name", [":smile:.[bold]x[/bold]", "layer." * 10 + "proj", "layer." * 30 + "proj"])
def test_a_table_in_a_pipe_shows_names_whole_and_as_they_are(name: str, run: Run, tmp_path: Path) -> None:
    folder = write_base(tmp_path / "named", {f"{name}.weight": torch.ones(3, 3)})
    assert rows(run("inspect", folder))[0] == [name, "linear", "3x3", "float32", "36"]


@pytest.mark.parametrize("weight", ["", "=0.5"])
def test_plan_lists_each_change_and_writes_nothing(weight: str, run: Run, base: Path, adapter: Path) -> None:
    before = file_hashes(base.parent)
    listed, data = run("plan", base, f"{adapter}{weight}"), parsed(run("plan", base, f"{adapter}{weight}", "--json"))
    assert data == surgery.plan(base, [(adapter, float(weight.strip("=") or 1))]).to_json()
    assert sorted(change["tensor"] for change in data["changes"]) == sorted(f"{site}.weight" for site in SITES)
    assert [cells[0] for cells in rows(listed)[:-1]] == [change["tensor"] for change in data["changes"]]
    assert listed.out.splitlines()[-1].startswith("4 weights to merge, 0 to replace, 5 untouched, 0 refused")
    assert listed.code == 0
    assert file_hashes(base.parent) == before


def test_plan_lists_every_refusal_and_writes_nothing(run: Run, base: Path, tmp_path: Path) -> None:
    tensors = factors() | {f"model.layers.0.{name}.lora_A.weight": torch.ones(3, 6) for name in ("q_proj", "up_proj")}
    adapter = write_adapter(tmp_path / "wrong", tensors)
    before = file_hashes(tmp_path)
    listed, as_json = run("plan", base, adapter), run("plan", base, adapter, "--json")
    data = json.loads(as_json.out)
    assert (listed.code, as_json.code, data["ok"]) == (3, 3, False)
    assert len(data["refusals"]) == 2
    assert told(listed, 3) == f"{base}: 2 refused, so nothing would be merged; the lines above say why"
    assert [line for line in listed.out.splitlines() if line.startswith("refused: ")] == [
        f"refused: {one}" for one in data["refusals"]
    ]
    assert file_hashes(tmp_path) == before


def test_plan_shows_what_patterns_resolve_and_the_entry_that_hits(run: Run, base: Path, tmp_path: Path) -> None:
    tensors = factors(r=4) | {
        f"{SITES[0]}.lora_A.weight": torch.ones(2, 6),
        f"{SITES[0]}.lora_B.weight": torch.ones(6, 2),
    }
    fields = {"target_modules": ["0.q_proj", "q_proj", "up_proj"], "use_rslora": True}
    adapter = write_adapter(
        tmp_path / "patterns", tensors, rank_pattern={"0.q_proj": 2}, alpha_pattern={"1.up_proj": 10}, **fields
    )
    listed = {cells[0]: cells[-1] for cells in rows(run("plan", base, adapter))[:-1]}
    assert listed == {
        f"{SITES[0]}.weight": "LoRA r=2 lora_alpha=6 scaling=4.24264 by '0.q_proj'",
        f"{SITES[1]}.weight": "LoRA r=4 lora_alpha=6 scaling=3 by 'up_proj'",
        f"{SITES[2]}.weight": "LoRA r=4 lora_alpha=6 scaling=3 by 'q_proj'",
        f"{SITES[3]}.weight": "LoRA r=4 lora_alpha=10 scaling=5 by 'up_proj'",
    }


def test_plan_tells_two_adapters_of_one_weight_apart(run: Run, base: Path, adapter: Path, tmp_path: Path) -> None:
    second = write_adapter(tmp_path / "second", factors(SITES[:1], r=2), r=2)
    listed = {cells[0]: cells[-1] for cells in rows(run("plan", base, adapter, f"{second}=0.5"))[:-1]}
    laid = f"LoRA r=4 lora_alpha=6 scaling=1.5 of {adapter} by 'q_proj'"
    assert listed[f"{SITES[2]}.weight"] == laid
    assert listed[f"{SITES[0]}.weight"] == f"{laid}, LoRA r=2 lora_alpha=6 scaling=1.5 of {second} by 'q_proj'"


def test_plan_says_what_a_head_that_is_written_apart_begins_as(run: Run, tmp_path: Path) -> None:
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True}
    tied = write_base(tmp_path / "tied", {"model.embed_tokens.weight": torch.randn(11, 6)}, config=config)
    named = {"lm_head.lora_A.weight": torch.randn(4, 6), "lm_head.lora_B.weight": torch.randn(11, 4)}
    adapter = write_adapter(tmp_path / "adapter", named, target_modules=["lm_head"])
    listed = rows(run("plan", tied, adapter, "--tied", "untie"))[0]
    assert listed[-1].startswith("begins as model.embed_tokens.weight, LoRA r=4")
    assert surgery.plan(tied, adapter, tied="untie").to_json()["changes"][0]["begins"] == "model.embed_tokens.weight"


def test_plan_shows_what_a_cast_changes(run: Run, base: Path, adapter: Path) -> None:
    listed = {cells[0]: cells[-2:] for cells in rows(run("plan", base, adapter, "--dtype", "float16"))[:-1]}
    assert listed["model.layers.0.q_proj.weight"] == ["float16", "LoRA r=4 lora_alpha=6 scaling=1.5 by 'q_proj'"]
    assert listed["lm_head.weight"] == ["float16", "cast"]
    assert "model.positions" not in listed


def test_merge_writes_what_the_function_writes(run: Run, base: Path, adapter: Path, tmp_path: Path) -> None:
    found = run("merge", base, adapter, tmp_path / "out")
    surgery.merge_checkpoint(base, adapter, tmp_path / "wanted")
    assert found == Outcome(0, f"{tmp_path / 'out'}: 4 tensors changed, 5 carried as bytes\n", "")
    assert file_hashes(tmp_path / "out") == file_hashes(tmp_path / "wanted") != file_hashes(base)


def test_merge_in_json_holds_the_receipt(run: Run, base: Path, adapter: Path, tmp_path: Path) -> None:
    data = parsed(run("merge", base, adapter, tmp_path / "out", "--json"))
    assert data == {"out": str(tmp_path / "out"), "receipt": json.loads((tmp_path / "out" / RECEIPT).read_text())}


@pytest.mark.parametrize("spelled", ["0.5", "-1", "1e-3", "2"])
def test_a_weight_gives_what_the_function_gives(
    spelled: str, run: Run, base: Path, adapter: Path, tmp_path: Path
) -> None:
    assert run("merge", base, f"{adapter}={spelled}", tmp_path / "out").code == 0
    surgery.merge_checkpoint(base, [(adapter, float(spelled))], tmp_path / "wanted")
    surgery.merge_checkpoint(base, adapter, tmp_path / "unweighted")
    assert file_hashes(tmp_path / "out") == file_hashes(tmp_path / "wanted")
    weights = [file_hashes(tmp_path / name)["model.safetensors"] for name in ("out", "unweighted")]
    assert weights[0] != weights[1]


@pytest.mark.parametrize(
    ("spelled", "wanted"),
    [("adapter=2", ("adapter=2", 1)), ("adapter=2=0.5", ("adapter=2", 0.5)), ("adapter=3", ("adapter", 3))],
)
def test_an_existing_path_wins_over_a_weight(
    spelled: str, wanted: tuple[str, float], run: Run, base: Path, adapter: Path
) -> None:
    folder = adapter.parent
    write_adapter(folder / "adapter=2", factors(seed=7))
    assert run("merge", base, folder / spelled, folder / "out").code == 0
    surgery.merge_checkpoint(base, [(folder / wanted[0], wanted[1])], folder / "wanted")
    assert file_hashes(folder / "out") == file_hashes(folder / "wanted")


@pytest.mark.parametrize("spelled", ["=nan", "=inf", "=-inf", "=1e999", "=", "=half"])
def test_what_is_no_finite_number_is_no_weight(
    spelled: str, run: Run, base: Path, adapter: Path, tmp_path: Path
) -> None:
    found = run("merge", base, f"{adapter}{spelled}", tmp_path / "out")
    assert f"its weight is '{spelled[1:]}'; a finite number is wanted" in told(found, 2)
    assert "no such file or folder" in told(run("merge", base, f"{adapter}x{spelled}", tmp_path / "out"), 3)
    assert not (tmp_path / "out").exists()


def test_two_adapters_merge_in_their_order(run: Run, base: Path, adapter: Path, tmp_path: Path) -> None:
    second = write_adapter(tmp_path / "second", factors(SITES[:2], seed=5))
    assert run("merge", base, f"{adapter}=0.5", second, tmp_path / "out").code == 0
    surgery.merge_checkpoint(base, [(adapter, 0.5), second], tmp_path / "wanted")
    assert file_hashes(tmp_path / "out") == file_hashes(tmp_path / "wanted")
    methods = {name: len(one["methods"]) for name, one in _receipt(tmp_path / "out")["changed"].items()}
    assert methods == {f"{site}.weight": 2 if site in SITES[:2] else 1 for site in SITES}


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_dtype_casts_all_floats(dtype: str, run: Run, base: Path, adapter: Path, tmp_path: Path) -> None:
    assert run("merge", base, adapter, tmp_path / "out", "--dtype", dtype).code == 0
    tensors = read_tensors(tmp_path / "out")
    assert tensors.pop("model.positions").dtype == torch.int64
    assert {values.dtype for values in tensors.values()} == {getattr(torch, dtype)}
    surgery.merge_checkpoint(base, adapter, tmp_path / "wanted", dtype=dtype)
    assert file_hashes(tmp_path / "out") == file_hashes(tmp_path / "wanted")


def test_overwrite_replaces_the_output_whole(run: Run, base: Path, adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("{}")
    (tmp_path / "out" / "old.txt").write_text("old")
    assert run("merge", base, adapter, tmp_path / "out").code == 6
    assert run("merge", base, adapter, tmp_path / "out", "--overwrite").code == 0
    assert file_hashes(tmp_path / "out").keys() == {*file_hashes(base), RECEIPT}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "out"]


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("options", [(), ("--dtype", "float32")])
def test_unmerge_gives_back_files_of_the_same_sha256(
    options: tuple[str, ...], shards: int, run: Run, adapter: Path, tmp_path: Path
) -> None:
    folder = write_base(tmp_path / "model", base_tensors(torch.bfloat16), shards, {"model_type": "llama"})
    original = file_hashes(folder)
    assert run("merge", folder, adapter, tmp_path / "out", "--reversible", *options).code == 0
    found = run("unmerge", tmp_path / "out", tmp_path / "back")
    count = len(original)
    assert found == Outcome(0, f"{tmp_path / 'back'}: {count} files, each with the sha256 of the original\n", "")
    assert file_hashes(tmp_path / "back") == original
    merged = file_hashes(tmp_path / "out")
    assert all(merged[name] != digest for name, digest in original.items() if name.endswith(".safetensors"))
    data = parsed(run("unmerge", tmp_path / "out", tmp_path / "back", "--overwrite", "--json"))
    assert data == {"out": str(tmp_path / "back"), "files": original}


def test_unmerge_refuses_a_merge_that_is_not_reversible(run: Run, base: Path, adapter: Path, tmp_path: Path) -> None:
    run("merge", base, adapter, tmp_path / "out")
    assert run("unmerge", tmp_path / "out", tmp_path / "back").code == 3
    assert not (tmp_path / "back").exists()


def _receipt(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / RECEIPT).read_text())
    return found


def test_the_hash_of_a_model_or_adapter_is_printed_alone_and_is_what_merge_expects(
    run: Run, base: Path, adapter: Path, tmp_path: Path
) -> None:
    hashes = [run("inspect", "--sha256", path).out.strip() for path in (base, adapter)]
    assert all(len(one) == 64 for one in hashes)
    expected = ("--expect-base-sha256", hashes[0], "--expect-adapter-sha256", hashes[1])
    assert run("merge", base, adapter, tmp_path / "out", *expected).code == 0
    listed = parsed(run("inspect", "--json", adapter))
    assert listed["sha256"] == hashes[1]
    files = [adapter / name for name in ("adapter_config.json", "adapter_model.safetensors")]
    lines = "".join(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in files)
    assert hashlib.sha256(lines.encode()).hexdigest() == hashes[1]  # as sha256sum gives it


@pytest.mark.parametrize("options", [("--op", "q_proj"), ("--op", "=linear"), ("--op", "q_proj=conv2d")])
def test_an_op_that_is_no_pair_is_a_usage_error(options: tuple[str, ...], run: Run, base: Path, adapter: Path) -> None:
    told(run("plan", base, adapter, *options), 2)


def test_the_options_of_a_merge_reach_it(run: Run, base: Path, adapter: Path, tmp_path: Path) -> None:
    options = ("--max-shard-size", "400B", "--tied", "untie", "--op", "q_proj=linear", "--no-resume")
    assert run("merge", base, adapter, tmp_path / "out", *options).code == 0
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    told(run("merge", base, adapter, tmp_path / "other", "--resume"), 3)
    assert not (tmp_path / "other").exists()
    assert run("verify", base, adapter, tmp_path / "out", "--op", "q_proj=linear").code == 0


def test_help_tells_each_command_in_a_whole_sentence(run: Run) -> None:
    listed = run("--help").out.partition("Commands:\n")[2].partition("\n\n")[0].splitlines()
    assert len(listed) > 5
    assert [line for line in listed if not line.endswith(".") or line.endswith("...")] == []
