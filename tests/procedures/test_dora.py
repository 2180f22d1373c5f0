"""DoRA through every procedure: rows that depend on each other, in both layouts, beside other methods, and back."""

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_folders import file_hashes, read_tensors, tensor_hashes, write_adapter, write_base
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import surgery
from surgery import IA3Config, LoraConfig, MatchError, ValueRangeError
from surgery.adapters.peft import read_adapter
from surgery.core.adapter import Weighted
from surgery.core.source import TILE_ELEMENTS
from surgery.hosts.checkpoint import Checkpoint
from surgery.procedures.writing.filling import Pace
from surgery.procedures.writing.merge_checkpoint import Options, merge_checkpoint

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TARGETS = ["embed", "up", "down"]
CHANGED = {"embed.weight", "up.weight", "down.weight"}
DORA = LoraConfig(r=3, lora_alpha=5, use_dora=True, target_modules=TARGETS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


class Net(nn.Module):
    """An embedding, whose norms run over 130 tokens; a Conv1D; a Linear. One row of each is zero."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.down = nn.Embedding(130, 6), Conv1D(10, 6), nn.Linear(10, 6)
        self.head = nn.Linear(6, 130)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.down(torch.tanh(self.up(self.embed(x)))))


def net(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(3)
    made = Net()
    with torch.no_grad():
        made.up.weight.normal_()
        made.up.bias.normal_()
        made.down.weight[2] = 0
        made.up.weight[:, 1] = 0
    return made.to(dtype).eval()


def moved(model: nn.Module) -> nn.Module:
    """Every tensor that is trained, off its start."""
    with torch.no_grad():
        for values in model.parameters():
            if values.requires_grad:
                values.add_(torch.randn_like(values) / 3)
    return model


def adapter(folder: Path, config: surgery.AdapterConfig = DORA) -> Path:
    surgery.save(moved(surgery.inject(net(), config)), folder)
    (folder / "surgery.base.json").unlink()  # the tests lay it over the same base in other dtypes
    return folder


def merged(base: Path, paths: list[Path], out: Path, tile_elements: int = TILE_ELEMENTS) -> Path:
    given = [Weighted(read_adapter(path)) for path in paths]
    with Checkpoint(base) as source:
        merge_checkpoint(source, given, out, Options(reversible=True, pace=Pace(tile_elements=tile_elements)))
    return out


@pytest.fixture
def x() -> Tensor:
    return torch.arange(12).view(3, 4) * 7


@each_dtype
def test_a_fresh_adapter_changes_no_output_and_no_merge(dtype: torch.dtype, x: Tensor) -> None:
    model = surgery.inject(net(dtype), DORA)
    before = tensor_hashes(model.state_dict())
    assert torch.equal(model(x), net(dtype)(x))
    surgery.merge(model)
    assert tensor_hashes(model.state_dict()) == before


@each_dtype
@pytest.mark.parametrize("undo", ["index", "copy"])
def test_a_live_merge_gives_the_outputs_and_unmerge_gives_the_weights_back(
    dtype: torch.dtype, undo: str, x: Tensor
) -> None:
    model = moved(surgery.inject(net(dtype), DORA))
    before, out = tensor_hashes(model.state_dict()), model(x).detach()
    surgery.merge(model, undo=undo)
    after = tensor_hashes(model.state_dict())
    assert {name.replace("base_layer.", "") for name in before if after[name] != before[name]} == CHANGED
    # Four layers, sums of at most 10 terms of size 4 at most; the weights are rounded once, the norm in float32.
    room = 4 * (10 + 4) * torch.finfo(dtype).eps * max(4.0, float(out.abs().max()))
    assert float((model(x).detach() - out).abs().max()) <= room
    surgery.unmerge(model)
    assert tensor_hashes(model.state_dict()) == before
    surgery.merge(model)
    assert tensor_hashes(surgery.eject(model).state_dict()) == tensor_hashes(net(dtype).state_dict())


@each_dtype
def test_the_merge_is_the_formula_in_float64_rounded_once(dtype: torch.dtype, tmp_path: Path) -> None:
    base, path = write_base(tmp_path / "base", net(dtype).state_dict()), adapter(tmp_path / "adapter")
    found, tensors = read_tensors(merged(base, [path], tmp_path / "out")), read_tensors(base)
    factors = load_file(path / "adapter_model.safetensors")
    for name, spelled in (("embed", "lora_embedding_{}"), ("up", "lora_{}.weight"), ("down", "lora_{}.weight")):
        A, B = (factors[f"base_model.model.{name}.{spelled.format(one)}"].double() for one in "AB")
        m = factors[f"base_model.model.{name}.lora_magnitude_vector"].double()
        W = tensors[f"{name}.weight"].double()
        V = (W if name == "down" else W.T) + 5 / 3 * B @ A
        wanted = m[:, None] * V / V.norm(dim=1, keepdim=True)
        wanted = wanted if name == "down" else wanted.T
        # The factors' grid of 22 bits, and the norm in float32; then half an ulp of the dtype.
        room = 3 * 2.0**-19 * wanted.abs().max() + torch.finfo(dtype).eps * wanted.abs()
        assert bool(((found[f"{name}.weight"].double() - wanted).abs() <= room).all())


@each_dtype
@pytest.mark.parametrize("tile_elements", [1, 40, TILE_ELEMENTS])
def test_live_and_streaming_merges_are_equal_for_any_tile(
    dtype: torch.dtype, tile_elements: int, tmp_path: Path
) -> None:
    base, path = write_base(tmp_path / "base", net(dtype).state_dict(), shards=2), adapter(tmp_path / "adapter")
    out = merged(base, [path], tmp_path / "out", tile_elements)
    model = surgery.eject(surgery.merge(surgery.load(net(dtype), path)), keep_merged=True)
    assert tensor_hashes(read_tensors(out)) == tensor_hashes(model.state_dict())
    counts = surgery.verify_checkpoint(base, path, out).counts
    assert counts == {"bits": 3, "untouched": 4, "rounding": 0, "different": 0, "recorded": 0}
    surgery.unmerge_checkpoint(out, tmp_path / "back")
    assert file_hashes(tmp_path / "back") == file_hashes(base)


def test_the_undo_record_is_small_for_it_holds_a_norm_for_each_output(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = write_base(tmp_path / "base", {"up.weight": torch.randn(64, 512).bfloat16()})
    layer = nn.ModuleDict({"up": nn.Linear(512, 64, bias=False)})
    surgery.save(moved(surgery.inject(layer, LoraConfig(r=2, use_dora=True, target_modules=["up"]))), tmp_path / "one")
    (tmp_path / "one" / "surgery.base.json").unlink()
    out = merged(base, [tmp_path / "one"], tmp_path / "out")
    record = json.loads((out / "surgery.undo" / "record.json").read_text())["tensors"]["up.weight"]
    assert record["sums"]["0"][1] == 64 * 8
    assert (out / "surgery.undo" / "streams-0").stat().st_size < 64 * 512 * 2 / 4


@each_dtype
@pytest.mark.parametrize("order", list(itertools.permutations(["dora", "lora", "other"])), ids=str)
def test_adapters_apply_in_their_order_live_and_streaming_and_come_back(
    dtype: torch.dtype, order: tuple[str, ...], x: Tensor, tmp_path: Path
) -> None:
    configs = {
        "dora": DORA,
        "lora": LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False),
        "other": LoraConfig(r=1, use_dora=True, target_modules=["up", "down"], use_rslora=True),
    }
    base = write_base(tmp_path / "base", net(dtype).state_dict())
    paths = [adapter(tmp_path / name, configs[name]) for name in order]
    out = merged(base, paths, tmp_path / "out", tile_elements=40)
    model = net(dtype)
    for name, path in zip(order, paths, strict=True):
        surgery.load(model, path, adapter_name=name)
    surgery.set_adapter(model, list(order))
    with torch.no_grad():
        found, weight = model(x), model.up.weight.clone()
    surgery.eject(surgery.merge(model), keep_merged=True)
    room = 3 * 4 * (10 + 6) * torch.finfo(dtype).eps * max(8.0, float(found.abs().max()))
    assert float((model(x).detach() - found).abs().max()) <= room
    room = torch.finfo(dtype).eps * weight.abs() + 16 * 8 * torch.finfo(torch.float32).eps
    assert bool(((model.up.weight - weight).abs() <= room).all())
    assert tensor_hashes(read_tensors(out)) == tensor_hashes(model.state_dict())
    report = surgery.verify_checkpoint(base, paths, out)
    assert report.ok
    assert report.counts["rounding"] == 0
    assert not surgery.verify_checkpoint(base, paths[::-1], out).ok
    surgery.unmerge_checkpoint(out, tmp_path / "back")
    assert file_hashes(tmp_path / "back") == file_hashes(base)


def test_it_scales_what_ia3_made_of_the_base(x: Tensor, tmp_path: Path) -> None:
    ia3 = IA3Config(target_modules=["up", "down"], feedforward_modules=["down"])
    paths = [adapter(tmp_path / "ia3", ia3), adapter(tmp_path / "dora")]
    base = write_base(tmp_path / "base", net().state_dict())
    model = surgery.load(surgery.load(net(), paths[0], adapter_name="a"), paths[1], adapter_name="b")
    surgery.set_adapter(model, ["a", "b"])
    out = model(x).detach()
    surgery.eject(surgery.merge(model), keep_merged=True)
    assert float((model(x).detach() - out).abs().max()) <= 4 * 20 * torch.finfo(torch.float32).eps * float(
        out.abs().max()
    )
    assert tensor_hashes(read_tensors(merged(base, paths, tmp_path / "out"))) == tensor_hashes(model.state_dict())


@pytest.mark.parametrize("cast", ["float32", "bfloat16"])
@pytest.mark.parametrize("weight", [0.5, -1.0, 0.0])
def test_any_weight_and_dtype_come_back(cast: str, weight: float, tmp_path: Path) -> None:
    base, path = write_base(tmp_path / "base", net(torch.float16).state_dict()), adapter(tmp_path / "adapter")
    surgery.merge_checkpoint(base, [(path, weight)], tmp_path / "out", reversible=True, dtype=cast)
    assert surgery.verify_checkpoint(base, [(path, weight)], tmp_path / "out").counts["different"] == 0
    surgery.unmerge_checkpoint(tmp_path / "out", tmp_path / "back")
    assert file_hashes(tmp_path / "back") == file_hashes(base)


def test_plan_and_receipt_tell_of_it(tmp_path: Path) -> None:
    base, path = write_base(tmp_path / "base", net().state_dict()), adapter(tmp_path / "adapter")
    told = {one["tensor"]: one for one in surgery.plan(base, path).to_json()["changes"]}
    assert told.keys() == CHANGED
    one = {"method": "DoRA", "scaling": (5 / 3).hex(), "strength": (1.0).hex()}
    assert all(change["methods"] == [one] for change in told.values())
    receipt = surgery.merge_checkpoint(base, path, tmp_path / "out").receipt
    assert receipt["changed"].keys() == CHANGED


@pytest.mark.parametrize("name", sorted(CHANGED))
def test_one_element_that_is_off_is_different(name: str, tmp_path: Path) -> None:
    base, path = write_base(tmp_path / "base", net().state_dict()), adapter(tmp_path / "adapter")
    out = merged(base, [path], tmp_path / "out")
    tensors = read_tensors(out)
    largest = tensors[name].abs().argmax()
    tensors[name].view(-1)[largest] *= 1 + 200 * torch.finfo(torch.float32).eps
    save_file(tensors, out / "model.safetensors")
    report = surgery.verify_checkpoint(base, path, out)
    assert [found for found, one in report.tensors.items() if one.grade == "different"] == [name]


def test_a_norm_summed_one_by_one_in_float32_is_rounding_and_what_no_order_gives_is_different(tmp_path: Path) -> None:
    torch.manual_seed(0)
    W, m = torch.rand(4, 4096) + 1, torch.rand(4) + 1
    base = write_base(tmp_path / "base", {"up.weight": W})
    factors = {"lora_A.weight": torch.rand(1, 4096), "lora_B.weight": torch.zeros(4, 1), "lora_magnitude_vector": m}
    path = write_adapter(
        tmp_path / "adapter", {f"up.{key}": values for key, values in factors.items()}, r=1, use_dora=True
    )
    norm = torch.from_numpy(np.cumsum(W.numpy() ** 2, axis=1, dtype=np.float32)[:, -1]).sqrt()
    for name, factor, grade in (("plain", 1.0, "rounding"), ("off", 1 + 2e-4, "different")):
        out = write_base(tmp_path / name, {"up.weight": factor * (m / norm)[:, None] * W})
        assert surgery.verify_checkpoint(base, path, out).tensors["up.weight"].grade == grade


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_magnitudes_that_are_no_numbers_are_refused_and_nothing_changes(bad: float, tmp_path: Path) -> None:
    model = moved(surgery.inject(net(), DORA))
    with torch.no_grad():
        model.down.fitted["default"].params["m"][2].fill_(bad)
    surgery.save(model, tmp_path / "adapter")
    before = tensor_hashes(model.state_dict())
    with pytest.raises(ValueRangeError, match="down: m holds NaN or infinity"):
        surgery.merge(model)
    assert tensor_hashes(model.state_dict()) == before


@pytest.mark.parametrize("bad", [1e-200, 1e200, float("nan")])
def test_norms_that_float64_cannot_hold_are_refused(bad: float, tmp_path: Path) -> None:
    tensors = {name: values.double() for name, values in net().state_dict().items()}
    tensors["down.weight"][2] = bad
    base = write_base(tmp_path / "base", tensors)
    path = adapter(tmp_path / "adapter", LoraConfig(r=3, use_dora=True, target_modules=TARGETS))
    factors = load_file(path / "adapter_model.safetensors")
    factors["base_model.model.down.lora_B.weight"][2] = 0
    save_file(factors, path / "adapter_model.safetensors")
    with pytest.raises(ValueRangeError, match=r"down\.weight: the norm"):
        surgery.merge_checkpoint(base, path, tmp_path / "out")


def test_a_file_lacking_magnitudes_or_bringing_them_unasked_is_refused(tmp_path: Path) -> None:
    path = adapter(tmp_path / "adapter")
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps(config | {"use_dora": False}))
    with pytest.raises(surgery.FormatError, match=r"no place for .*lora_magnitude_vector"):
        surgery.load(net(), path)
    (path / "adapter_config.json").write_text(json.dumps(config))
    factors = load_file(path / "adapter_model.safetensors")
    left = {name: values for name, values in factors.items() if name != "base_model.model.up.lora_magnitude_vector"}
    save_file(left, path / "adapter_model.safetensors")
    with pytest.raises(surgery.FormatError, match="up has no tensor m"):
        surgery.load(net(), path)


def test_magnitudes_spelled_as_in_a_model_are_read_too(x: Tensor, tmp_path: Path) -> None:
    path = adapter(tmp_path / "adapter")
    wanted = surgery.load(net(), path)(x)
    factors = load_file(path / "adapter_model.safetensors")
    renamed = {f"{k}.weight" if k.endswith("vector") else k: v for k, v in factors.items()}
    save_file(renamed, path / "adapter_model.safetensors")
    assert torch.equal(surgery.load(net(), path)(x), wanted)


def test_it_is_compiled_in_one_piece(x: Tensor) -> None:
    # Compiled, the scaling is a product of its own: one by a power of two rounds nothing.
    model = moved(surgery.inject(net(), dataclasses.replace(DORA, lora_alpha=6)))
    wanted, found = model(x), torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    assert torch.equal(found, wanted)
    found.square().sum().backward()
    assert all(values.grad is not None for values in model.parameters() if values.requires_grad)


def test_dropout_drops_of_the_base_too_and_only_in_training(x: Tensor) -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=2, use_dora=True, lora_dropout=0.5, target_modules=["down"])
    model = moved(surgery.inject(net(), config))
    plain = model(x)
    assert torch.equal(model(x), plain)
    model.train()
    assert not torch.equal(model(x), model(x))


def test_a_layer_that_it_does_not_serve_is_refused_by_name() -> None:
    from surgery.core.site import Site, TensorInfo
    from surgery.ops.bias import Bias

    site = Site("x", {"weight": TensorInfo("x.weight", torch.float32, (4,))}, Bias())
    with pytest.raises(MatchError, match="x: its op is bias; DoRA is supported over Linear, Conv1D, Embedding and"):
        DORA.method("x").tensors(site)
    grouped = nn.Sequential(nn.Conv2d(4, 6, 2, groups=2))
    with pytest.raises(MatchError, match="0: it is a convolution in 2 groups; DoRA is supported over"):
        surgery.inject(grouped, LoraConfig(r=2, use_dora=True, target_modules=["0"]))


def test_a_weight_of_zeros_alone_is_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 4))
    nn.init.zeros_(model[0].weight)
    with pytest.raises(surgery.StateError, match="0: its weight is zero everywhere"):
        surgery.inject(model, surgery.LoraConfig(r=2, target_modules=["0"], use_dora=True))
    assert type(model[0]) is nn.Linear
