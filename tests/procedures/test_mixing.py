"""Methods that make elements of several others: beside others, into formats, over quantized layers."""

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_folders import write_base
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import surgery
from surgery import ValueRangeError

FILE = "model.safetensors"
TARGETS: dict[str, Any] = {"target_modules": ["0", "2"]}
CONFIGS: dict[str, Callable[[], surgery.AdapterConfig]] = {
    "oft": lambda: surgery.OFTConfig(oft_block_size=16, **TARGETS),
    "road": lambda: surgery.RoadConfig(group_size=32, variant="road_4", **TARGETS),
    "boft": lambda: surgery.BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=2, **TARGETS),
    "hra": lambda: surgery.HRAConfig(r=4, **TARGETS),
    "lora": lambda: surgery.LoraConfig(r=4, lora_alpha=6, **TARGETS),
    "dora": lambda: surgery.LoraConfig(r=4, lora_alpha=6, use_dora=True, **TARGETS),
    "ia3": lambda: surgery.IA3Config(feedforward_modules=["2"], **TARGETS),
}
CHAINS = [
    ("oft", "lora"),
    ("lora", "oft"),
    ("oft", "dora"),
    ("ia3", "oft"),
    ("oft", "oft"),
    ("oft", "lora", "oft"),
    ("hra", "oft"),
    ("boft", "lora", "boft"),
    ("road", "ia3", "oft"),
    ("lora", "road"),
]
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
each_chain = pytest.mark.parametrize("chain", CHAINS, ids="-".join)


def net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64)).to(dtype)


def given(dtype: torch.dtype = torch.float32) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(6, 64, dtype=dtype)


def base(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    return write_base(folder, net(dtype).state_dict())


def adapters(folder: Path, chain: tuple[str, ...], dtype: torch.dtype = torch.float32) -> list[Path]:
    """Each trained in the same way, whatever the chain."""
    found = []
    for index, kind in enumerate(chain):
        model = surgery.inject(net(dtype), CONFIGS[kind]())
        torch.manual_seed(5 + index)
        with torch.no_grad():
            for values in model.parameters():
                if values.requires_grad:
                    values.add_(torch.randn_like(values) * 0.1)
        surgery.save(model, folder / f"{index}")
        found.append(folder / f"{index}")
    return found


def loaded(model: nn.Module, folders: list[Path]) -> nn.Module:
    names = [f"a{index}" for index in range(len(folders))]
    for name, folder in zip(names, folders, strict=True):
        surgery.load(model, folder, adapter_name=name)
    surgery.set_adapter(model, names)
    return model


@each_dtype
@each_chain
def test_beside_others_a_merge_is_the_same_live_and_on_files_acts_in_order_and_comes_back(
    chain: tuple[str, ...], dtype: torch.dtype, tmp_path: Path
) -> None:
    folders, plain = adapters(tmp_path, chain, dtype), base(tmp_path / "base", dtype)
    model = loaded(net(dtype), folders)
    with torch.no_grad():
        before = model(given(dtype))
        out = surgery.merge(model)(given(dtype))
        # Of half types the weights alone err by an eps each, over two sums of at most 128 of them.
        size = 2 * 128**0.5 * torch.finfo(dtype).eps * float(before.abs().max())
        assert float((out - before).abs().max()) <= size
        assert float((net(dtype)(given(dtype)) - before).abs().max()) > size
    surgery.merge_checkpoint(plain, folders, tmp_path / "out", reversible=True)
    live, streamed = model.state_dict(), load_file(tmp_path / "out" / FILE)
    assert all(
        torch.equal(live[f"{name.partition('.')[0]}.base_layer.weight"], streamed[name])
        for name in streamed
        if "weight" in name
    )
    report = surgery.verify_checkpoint(plain, folders, tmp_path / "out")
    assert {one.grade for one in report.tensors.values()} <= {"bits", "untouched"}
    assert not surgery.verify_checkpoint(plain, folders[::-1], tmp_path / "out").ok
    surgery.unmerge_checkpoint(tmp_path / "out", tmp_path / "back")
    assert (tmp_path / "back" / FILE).read_bytes() == (plain / FILE).read_bytes()
    assert all(
        torch.equal(a, b)
        for a, b in zip(surgery.eject(model).state_dict().values(), net(dtype).state_dict().values(), strict=True)
    )


@each_dtype
@each_chain
def test_merges_one_after_another_pass_as_rounding_and_a_mistaken_one_does_not(
    chain: tuple[str, ...], dtype: torch.dtype, tmp_path: Path
) -> None:
    """As a tool that rounds in between gives them; and with the last left out."""
    folders, plain = adapters(tmp_path, chain, dtype), base(tmp_path / "base", dtype)
    model = net(dtype)
    for folder in folders:
        (folder / "surgery.base.json").unlink()  # the base that it met is another
        model = surgery.eject(surgery.merge(surgery.load(model, folder)), keep_merged=True)
    out = write_base(tmp_path / "out", {name: values.contiguous() for name, values in model.state_dict().items()})
    if "dora" in chain:  # whose norm is of the weight that it meets
        assert not surgery.verify_checkpoint(plain, folders, out).ok
        return
    report = surgery.verify_checkpoint(plain, folders, out)
    report.require()
    assert "rounding" in {one.grade for one in report.tensors.values()}
    assert not surgery.verify_checkpoint(plain, folders[:-1], out).ok
    weights = load_file(out / FILE)
    weights["0.weight"][5, 7] *= 1 + max(64 * torch.finfo(dtype).eps, 2.0**-10)
    save_file(weights, out / FILE)
    assert [
        name for name, one in surgery.verify_checkpoint(plain, folders, out).tensors.items() if one.grade == "different"
    ] == ["0.weight"]


@pytest.mark.parametrize("form", ["nf4", "int8", "fp8_dynamic", "w4a16"])
def test_a_merge_into_a_format_is_checked_to_the_bit_and_comes_back(form: str, tmp_path: Path) -> None:
    folders, plain = adapters(tmp_path, ("oft", "hra"), torch.bfloat16), base(tmp_path / "base", torch.bfloat16)
    surgery.merge_checkpoint(plain, folders, tmp_path / "out", into=form, reversible=True)
    grades = {one.grade for one in surgery.verify_checkpoint(plain, folders, tmp_path / "out").tensors.values()}
    assert "bits" in grades
    assert grades <= {"bits", "untouched"}
    surgery.unmerge_checkpoint(tmp_path / "out", tmp_path / "back")
    assert (tmp_path / "back" / FILE).read_bytes() == (plain / FILE).read_bytes()


def test_it_runs_over_quantized_layers_and_merges_into_plain_ones(tmp_path: Path) -> None:
    (folder,) = adapters(tmp_path, ("oft",))
    model = surgery.load(surgery.quantize(net(), "nf4"), folder)
    before = model(given())
    with surgery.disable_adapters(model):
        alone = model(given())
    surgery.merge(model, into="16bit")
    size = 128**0.5 * torch.finfo(model[0].weight.dtype).eps * float(before.abs().max())
    assert float((model(given()) - before).abs().max()) <= size
    assert float((alone - before).abs().max()) > size
    surgery.unmerge(model)
    assert torch.equal(model(given()), before)


def test_each_row_of_a_batch_runs_under_its_own_adapter(tmp_path: Path) -> None:
    model = loaded(net(), adapters(tmp_path, ("oft", "lora", "hra")))
    names = ["a0", "a1", "__base__", "a2", "a0", "a2"]
    wanted = []
    for row, name in enumerate(names):
        surgery.set_adapter(model, [] if name == "__base__" else name)
        wanted.append(model(given()[row : row + 1]))
    with surgery.mixed_batch(model, names):
        found = model(given())
    # Sums of as many terms in another order.
    assert torch.allclose(found, torch.cat(wanted), rtol=0, atol=128 * torch.finfo(torch.float32).eps)


def test_a_copy_and_one_that_was_pickled_give_the_same(tmp_path: Path) -> None:
    model = loaded(net(), adapters(tmp_path, ("oft",)))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(given()), model(given()))
        assert torch.equal(surgery.merge(other)(given()), surgery.merge(copy.deepcopy(model))(given()))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_no_number_is_refused_by_what_holds_it(bad: float, tmp_path: Path) -> None:
    (folder,) = adapters(tmp_path, ("oft",))
    plain = base(tmp_path / "base")
    weights, numbers = load_file(plain / FILE), load_file(folder / "adapter_model.safetensors")
    save_file(weights | {"2.weight": weights["2.weight"].index_fill(0, torch.tensor([3]), bad)}, plain / FILE)
    with pytest.raises(ValueRangeError, match=r"^2\.weight: the base weight holds NaN or infinity"):
        surgery.merge_checkpoint(plain, folder, tmp_path / "out")
    save_file(weights, plain / FILE)
    name = next(name for name in numbers if ".0." in name)
    numbers[name][0, 0] = bad
    save_file(numbers, folder / "adapter_model.safetensors")
    with pytest.raises(ValueRangeError, match="0: R holds NaN or infinity"):
        surgery.merge_checkpoint(plain, folder, tmp_path / "out")


def test_an_export_gives_the_outputs_of_the_merge(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    model = loaded(net(), adapters(tmp_path, ("oft", "hra")))
    surgery.export_onnx(model, None, tmp_path / "onnx", inputs=given())
    session = onnxruntime.InferenceSession(tmp_path / "onnx" / "model.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: given().numpy()})
    wanted = surgery.merge(model)(given()).detach()
    assert torch.allclose(torch.from_numpy(found), wanted, rtol=0, atol=128 * torch.finfo(torch.float32).eps)


WIDE = 1280  # inputs of one weight, all in one block: dense, 13 MB in float64
METHODS = {
    "oft": lambda: surgery.OFTConfig(oft_block_size=WIDE, target_modules=["0"]),
    "cayley": lambda: surgery.OFTConfig(oft_block_size=WIDE, use_cayley_neumann=False, target_modules=["0"]),
    "boft": lambda: surgery.BOFTConfig(boft_block_size=WIDE // 2, boft_n_butterfly_factor=2, target_modules=["0"]),
    "hra": lambda: surgery.HRAConfig(r=WIDE // 2, target_modules=["0"]),
}
GROUP = 4096  # rows that no tile parts
MERGE = """
import sys, surgery
surgery.merge_checkpoint(*sys.argv[1:])
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc tells the peak here")
@pytest.mark.parametrize("kind", METHODS)
def test_the_memory_that_a_plan_tells_is_no_less_than_a_merge_of_huge_blocks_takes(kind: str, tmp_path: Path) -> None:
    _peak_is_told(nn.Linear(WIDE, 8), METHODS[kind](), tmp_path)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc tells the peak here")
def test_the_memory_that_a_plan_tells_is_no_less_than_a_merge_of_large_groups_of_rows_takes(tmp_path: Path) -> None:
    _peak_is_told(nn.Linear(512, GROUP), surgery.RoadConfig(group_size=GROUP, target_modules=["0"]), tmp_path)


def _peak_is_told(layer: nn.Module, config: surgery.AdapterConfig, tmp_path: Path) -> None:
    model = nn.Sequential(layer)
    start = write_base(tmp_path / "base", model.state_dict())
    surgery.save(surgery.inject(model, config), tmp_path / "adapter")
    told = surgery.plan(start, tmp_path / "adapter").peak_bytes
    call = [sys.executable, "-c", MERGE, *(str(one) for one in (start, tmp_path / "adapter", tmp_path / "out"))]
    found = subprocess.run(call, capture_output=True, text=True, check=True).stdout
    assert 1024 * int(found) <= told
    assert told < 2 * 1024 * int(found)
