"""What a merged folder holds, and what is left when a merge is refused or fails."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoint_folders import (
    INDEX,
    SITES,
    base_tensors,
    factors,
    file_hashes,
    read_tensors,
    tensor_hashes,
    write_adapter,
    write_base,
)

import surgery
from surgery import ConfigError, MatchError, OutputExistsError, ShapeError, SurgeryError, ValueRangeError

RECEIPT = "surgery.receipt.json"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_base(tmp_path / "base", base_tensors(torch.float32), config={"model_type": "llama"})


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "adapter")


def test_merging_a_plain_base_and_back_imports_no_transformers(base: Path, adapter: Path, tmp_path: Path) -> None:
    code = (
        "import sys, surgery; base, adapter, out = sys.argv[1:]\n"
        "surgery.plan(base, adapter); surgery.merge_checkpoint(base, adapter, out, reversible=True)\n"
        "assert surgery.verify_checkpoint(base, adapter, out).ok; surgery.unmerge_checkpoint(out, out + '.restored')\n"
        "assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, base, adapter, tmp_path / "out"], check=True)


def test_only_the_targets_change_and_the_receipt_names_them(base: Path, adapter: Path, tmp_path: Path) -> None:
    report = surgery.merge_checkpoint(base, adapter, tmp_path / "out")
    before, after = tensor_hashes(read_tensors(base)), tensor_hashes(read_tensors(tmp_path / "out"))
    assert before.keys() == after.keys()
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {f"{name.rpartition('.lora_')[0]}.weight" for name in factors()}
    assert report.receipt == json.loads((tmp_path / "out" / RECEIPT).read_text())
    assert changed == report.receipt["changed"].keys()
    assert before.keys() - changed == report.receipt["untouched"].keys()


def test_the_merged_weight_is_the_sum_in_float64_rounded_once(base: Path, tmp_path: Path) -> None:
    tensors = {name: values.half().float() for name, values in factors().items()}  # on the 22-bit grid as they are
    surgery.merge_checkpoint(base, [(write_adapter(tmp_path / "a", tensors), 0.5)], tmp_path / "out")
    name = "model.layers.1.up_proj"
    A, B = (tensors[f"{name}.lora_{letter}.weight"].double() for letter in "AB")
    scaling = 6 / 4 * 0.5
    wanted = (read_tensors(base)[f"{name}.weight"].double() + scaling * (B @ A)).float()
    assert torch.equal(read_tensors(tmp_path / "out")[f"{name}.weight"], wanted)


@pytest.mark.parametrize(("dtype", "step"), [(torch.float16, 2.0**-10), (torch.bfloat16, 2.0**-7)])
def test_a_half_weight_is_not_rounded_by_way_of_float32(dtype: torch.dtype, step: float, tmp_path: Path) -> None:
    name = "model.layers.0.q_proj"
    base = write_base(tmp_path / "ones", base_tensors(dtype) | {f"{name}.weight": torch.ones(6, 6, dtype=dtype)})
    A, B = torch.zeros(2, 6), torch.ones(6, 2)
    A[0], A[1], B[:, 1] = step / 2, 2.0**-26, 2.0**-14  # 1 + delta is 2^-40 above a tie, which float32 cannot hold
    tensors = {f"{name}.lora_A.weight": A, f"{name}.lora_B.weight": B}
    adapter = write_adapter(tmp_path / "tie", tensors, r=2, lora_alpha=2, target_modules=[name])
    surgery.merge_checkpoint(base, adapter, tmp_path / "out")
    assert torch.equal(read_tensors(tmp_path / "out")[f"{name}.weight"], torch.full((6, 6), 1 + step, dtype=dtype))


def test_stale_formats_are_left_out_and_the_receipt_says_so(base: Path, adapter: Path, tmp_path: Path) -> None:
    stale = ["onnx/model.onnx", "onnx/readme.txt", "pytorch_model.bin", "pytorch_model.bin.index.json", "q4.gguf"]
    kept = ["tokenizer.json", "generation_config.json", "code/modeling.py", "README.md"]
    for name in (*stale, *kept):
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text(name)
    report = surgery.merge_checkpoint(base, adapter, tmp_path / "out")
    assert report.receipt["left_out"] == sorted(stale)
    found = file_hashes(tmp_path / "out").keys()
    assert found == {*kept, "config.json", "model.safetensors", RECEIPT}
    assert all((tmp_path / "out" / name).read_text() == name for name in kept)


@pytest.mark.parametrize("spelled", ["dtype", "torch_dtype"])
def test_config_json_tells_the_dtype_that_the_weights_have(spelled: str, adapter: Path, tmp_path: Path) -> None:
    inner = {"hidden_size": 6, spelled: "float32"}
    config = {"model_type": "x", "text_config": inner, spelled: "float32"}
    base = write_base(tmp_path / "nested", base_tensors(torch.float32), config=config)
    surgery.merge_checkpoint(base, adapter, tmp_path / "out", dtype="bfloat16")
    wanted = config | {"text_config": inner | {spelled: "bfloat16"}, spelled: "bfloat16"}
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == wanted
    for name, values in read_tensors(tmp_path / "out").items():
        assert values.dtype == (torch.int64 if name == "model.positions" else torch.bfloat16)
    surgery.merge_checkpoint(base, adapter, tmp_path / "same")
    assert (tmp_path / "same" / "config.json").read_bytes() == (base / "config.json").read_bytes()


def test_the_index_tells_the_size_after_a_change_of_dtype(adapter: Path, tmp_path: Path) -> None:
    base = write_base(tmp_path / "sharded", base_tensors(torch.float32), shards=3)
    surgery.merge_checkpoint(base, adapter, tmp_path / "out", dtype="float16")
    told = json.loads((tmp_path / "out" / INDEX).read_text())
    assert told["metadata"]["total_size"] == sum(values.nbytes for values in read_tensors(tmp_path / "out").values())
    assert told["weight_map"] == json.loads((base / INDEX).read_text())["weight_map"]


def test_an_existing_output_is_refused_until_overwrite_is_said(base: Path, adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    with pytest.raises(OutputExistsError, match="out"):
        surgery.merge_checkpoint(base, adapter, out)
    with pytest.raises(OutputExistsError, match="holds no model and no adapter"):
        surgery.merge_checkpoint(base, adapter, out, overwrite=True)
    assert file_hashes(out).keys() == {"precious.txt"}
    (out / "config.json").write_text("{}")
    surgery.merge_checkpoint(base, adapter, out, overwrite=True)
    assert file_hashes(out).keys() == {"config.json", "model.safetensors", RECEIPT}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "out"]


@pytest.mark.parametrize("where", ["base", "base/out", "base/deeper/out", "adapter", "adapter/out", "."])
def test_an_output_that_overlaps_with_an_input_is_refused(
    where: str, base: Path, adapter: Path, tmp_path: Path
) -> None:
    before = file_hashes(tmp_path)
    with pytest.raises(OutputExistsError, match="overlaps"):
        surgery.merge_checkpoint(base, adapter, tmp_path / where, overwrite=True)
    assert file_hashes(tmp_path) == before


def _anything_in(folder: Path) -> list[Path]:
    return list(folder.rglob("*")) if folder.exists() else []


def _bad_factors(kind: str) -> dict[str, torch.Tensor]:
    tensors = factors()
    last = "model.layers.1.up_proj.lora_B.weight"
    if kind == "overflow":
        tensors[last] = torch.full_like(tensors[last], 3e38)
        tensors[last.replace("_B", "_A")] = torch.full((4, 6), 100.0)
    elif kind == "infinite":
        tensors[last][3, 2] = torch.inf
    elif kind == "shape":
        tensors[last] = tensors[last][:-1].contiguous()
    else:
        tensors["model.layers.7.up_proj.lora_A.weight"] = torch.ones(4, 6)
        tensors["model.layers.7.up_proj.lora_B.weight"] = torch.ones(10, 4)
    return tensors


@pytest.mark.parametrize(
    ("kind", "error"),
    [("overflow", ValueRangeError), ("infinite", ValueRangeError), ("shape", ShapeError), ("unknown", MatchError)],
)
@pytest.mark.parametrize("reversible", [False, True])
def test_a_failing_merge_leaves_no_output_and_no_staging_folder(
    kind: str, error: type[SurgeryError], reversible: bool, base: Path, tmp_path: Path
) -> None:
    adapter = write_adapter(tmp_path / "bad", _bad_factors(kind))
    with pytest.raises(error, match="layers"):
        surgery.merge_checkpoint(base, adapter, tmp_path / "new" / "out", reversible=reversible)
    assert _anything_in(tmp_path / "new") == []


def test_a_failing_overwrite_leaves_the_old_output(base: Path, tmp_path: Path) -> None:
    out = write_base(tmp_path / "out", base_tensors(torch.float16, seed=5))
    before = file_hashes(out)
    adapter = write_adapter(tmp_path / "bad", _bad_factors("infinite"))
    with pytest.raises(ValueRangeError):
        surgery.merge_checkpoint(base, adapter, out, overwrite=True)
    assert file_hashes(out) == before


@pytest.mark.parametrize("prefix", ["", "model."])
def test_modules_to_save_replace_the_bases_tensors(prefix: str, base: Path, tmp_path: Path) -> None:
    head = torch.randn(11, 6)
    tensors = factors() | {"lm_head.weight": head}
    adapter = write_adapter(tmp_path / "saved", tensors, modules_to_save=["lm_head"])
    if prefix:  # a base whose names all stand below one more module
        renamed = {prefix + name: values for name, values in base_tensors(torch.float32).items()}
        base = write_base(tmp_path / "renamed", renamed)
    surgery.merge_checkpoint(base, adapter, tmp_path / "out")
    merged = read_tensors(tmp_path / "out")
    assert torch.equal(merged[f"{prefix}lm_head.weight"], head)
    name = f"{prefix}model.layers.0.q_proj.weight"
    assert not torch.equal(merged[name], read_tensors(base)[name])


def test_replaced_modules_take_no_weight_but_one(base: Path, tmp_path: Path) -> None:
    tensors = factors() | {"lm_head.weight": torch.randn(11, 6)}
    adapter = write_adapter(tmp_path / "saved", tensors, modules_to_save=["lm_head"])
    with pytest.raises(ConfigError, match=r"saved: its weight is 0\.5; modules_to_save, bias of it"):
        surgery.merge_checkpoint(base, [(adapter, 0.5)], tmp_path / "out")


def test_what_one_adapter_replaces_and_another_adapts_is_refused_with_the_next_step(base: Path, tmp_path: Path) -> None:
    site, *others = SITES
    whole = {f"{site}.weight": read_tensors(base)[f"{site}.weight"] + 1}
    replacing = write_adapter(
        tmp_path / "whole", factors(tuple(others)) | whole, target_modules=others, modules_to_save=[site]
    )
    adapting = write_adapter(tmp_path / "factors", factors((site,)), target_modules=[site])
    for adapters in ([replacing, adapting], [adapting, replacing]):
        with pytest.raises(MatchError, match=r"\.weight: .*; leave one of the adapters out, or merge them apart"):
            surgery.merge_checkpoint(base, adapters, tmp_path / "out")


@pytest.mark.parametrize("name", ["model.safetensors", "weights_v2.safetensors"])
def test_a_base_in_one_file_gives_a_model_folder(name: str, base: Path, adapter: Path, tmp_path: Path) -> None:
    surgery.merge_checkpoint(base, adapter, tmp_path / "wanted")
    (base / "model.safetensors").rename(base / name)
    surgery.merge_checkpoint(base / name, adapter, tmp_path / "out", reversible=True)
    wanted = tensor_hashes(read_tensors(tmp_path / "wanted"))
    assert tensor_hashes(read_tensors(tmp_path / "out")) == wanted
    assert (tmp_path / "out" / "model.safetensors").is_file()
    surgery.unmerge_checkpoint(tmp_path / "out", tmp_path / "back")
    assert file_hashes(tmp_path / "back")["model.safetensors"] == file_hashes(base)[name]


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_tensor_without_elements_is_carried(dtype: str | None, adapter: Path, tmp_path: Path) -> None:
    tensors = base_tensors(torch.float32) | {"model.layers.0.spare": torch.empty(0, 6)}
    base = write_base(tmp_path / "spare", tensors)
    surgery.merge_checkpoint(base, adapter, tmp_path / "out", dtype=dtype, reversible=True)
    assert read_tensors(tmp_path / "out")["model.layers.0.spare"].shape == (0, 6)
    surgery.unmerge_checkpoint(tmp_path / "out", tmp_path / "back")
    assert file_hashes(tmp_path / "back") == file_hashes(base)


def test_a_tied_embedding_is_refused_even_if_a_layer_has_its_shape(tmp_path: Path) -> None:
    """A weight inside a numbered layer is no output head."""
    tensors = {"model.embed_tokens.weight": torch.randn(10, 6), "model.layers.0.up_proj.weight": torch.randn(10, 6)}
    base = write_base(tmp_path / "tied", tensors, config={"architectures": ["LlamaForCausalLM"]})
    parts = {"lora_embedding_A": torch.randn(4, 10), "lora_embedding_B": torch.randn(6, 4)}
    named = {f"model.embed_tokens.{part}": values for part, values in parts.items()}
    adapter = write_adapter(tmp_path / "embedding", named, target_modules=["embed_tokens"])
    with pytest.raises(MatchError, match=r"tied to lm_head\.weight"):
        surgery.merge_checkpoint(base, adapter, tmp_path / "out")
    untied = write_base(tmp_path / "untied", tensors | {"lm_head.weight": torch.randn(10, 6)})
    surgery.merge_checkpoint(untied, adapter, tmp_path / "out")


def test_an_option_that_is_none_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(surgery.UsageError, match="option 'revresible' is not known"):
        surgery.merge_checkpoint("nowhere", "nothing", tmp_path / "out", revresible=True)  # type: ignore[call-arg]
    with pytest.raises(surgery.UsageError, match="option 'revresible' is not known"):
        surgery.plan("nowhere", "nothing", revresible=None)  # type: ignore[call-arg]


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.float64], ids=str)
def test_factors_of_any_floats_are_merged_as_their_values(dtype: torch.dtype, base: Path, tmp_path: Path) -> None:
    held = {name: values.to(dtype) for name, values in factors().items()}
    for name, tensors in (("held", held), ("wide", {name: values.float() for name, values in held.items()})):
        surgery.merge_checkpoint(base, write_adapter(tmp_path / name, tensors), tmp_path / f"out-{name}")
    found, wanted = (tensor_hashes(read_tensors(tmp_path / f"out-{name}")) for name in ("held", "wide"))
    assert found == wanted
