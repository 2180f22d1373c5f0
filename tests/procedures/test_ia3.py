"""IA3 through every procedure: biases, factors of zero and below, other methods before and after it."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from checkpoint_folders import file_hashes, read_tensors, tensor_hashes, write_base
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import surgery
from surgery import ConfigError, FormatError, IA3Config, LoraConfig, MatchError, ValueRangeError

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TARGETS = {"target_modules": ["up", "down"], "feedforward_modules": ["down"]}
CHANGED = {"0.up.weight", "0.up.bias", "0.down.weight", "1.up.weight", "1.up.bias", "1.down.weight"}
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(3)
    blocks = (nn.Sequential() for _ in "ab")
    made = nn.Sequential(*blocks)
    for block in made:
        block.add_module("up", nn.Linear(6, 10))
        block.add_module("down", nn.Linear(10, 6))
    return made.to(dtype)


def moved(model: nn.Module, factors: list[float] | None = None) -> nn.Module:
    """Every factor off its one; the first of each tensor as given."""
    with torch.no_grad():
        for name, values in model.named_parameters():
            if "ia3_l" in name:
                values.add_(torch.randn_like(values) / 2)
                values.view(-1)[: len(factors or ())] = torch.tensor(factors or ())
    return model


def adapter(folder: Path, config: surgery.AdapterConfig, factors: list[float] | None = None) -> Path:
    surgery.save(moved(surgery.inject(net(), config), factors), folder)
    return folder


def without_print(folder: Path) -> Path:
    """An adapter that says nothing of the base it was made on."""
    (folder / "surgery.base.json").unlink()
    return folder


@pytest.fixture
def x() -> Tensor:
    return torch.linspace(-1, 1, 24).view(4, 6)


@each_dtype
@pytest.mark.parametrize("undo", ["index", "copy"])
def test_a_live_merge_changes_weights_and_biases_and_unmerge_gives_them_back(
    dtype: torch.dtype, undo: str, x: Tensor
) -> None:
    model = moved(surgery.inject(net(dtype), IA3Config(**TARGETS)), [0.0, -0.0, -1.0, 1.0])
    before, out = tensor_hashes(model.state_dict()), model(x.to(dtype)).detach()
    surgery.merge(model, undo=undo)
    after = tensor_hashes(model.state_dict())
    assert {name.replace("base_layer.", "") for name in before if after[name] != before[name]} == CHANGED
    # Each forward of two layers sums at most 11 terms and rounds each factor once, in either order.
    room = 2 * 2 * (11 + 2) * torch.finfo(dtype).eps * 4
    assert float((model(x.to(dtype)).detach() - out).abs().max()) <= room
    surgery.unmerge(model)
    assert tensor_hashes(model.state_dict()) == before
    surgery.merge(model)
    assert tensor_hashes(surgery.eject(model).state_dict()) == tensor_hashes(net(dtype).state_dict())


@each_dtype
def test_the_merge_is_the_product_in_float64_rounded_once(dtype: torch.dtype, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", net(dtype).state_dict())
    path = without_print(adapter(tmp_path / "adapter", IA3Config(**TARGETS)))
    surgery.merge_checkpoint(base, path, tmp_path / "out")
    tensors, found = read_tensors(base), read_tensors(tmp_path / "out")
    factors = load_file(path / "adapter_model.safetensors")
    for block, role in itertools.product("01", ("up.weight", "up.bias", "down.weight")):
        factor = factors[f"base_model.model.{block}.{role.split('.')[0]}.ia3_l"].double()
        factor = factor.flatten() if role == "up.bias" else factor
        wanted = tensors[f"{block}.{role}"].double() * factor
        assert torch.equal(found[f"{block}.{role}"], wanted.float().to(dtype))  # no ties here: twice is as once
    assert torch.equal(found["0.down.bias"], tensors["0.down.bias"])


@each_dtype
@pytest.mark.parametrize("order", list(itertools.permutations(["ia3", "lora", "other"])), ids=str)
def test_adapters_apply_in_their_order_live_and_streaming_and_come_back(
    dtype: torch.dtype, order: tuple[str, ...], tmp_path: Path
) -> None:
    configs = {
        "ia3": IA3Config(**TARGETS),
        "lora": LoraConfig(r=2, target_modules=["up", "down"], init_lora_weights=False),
        "other": IA3Config(target_modules=["up", "down"], feedforward_modules=["up"]),
    }
    base = write_base(tmp_path / "base", net(dtype).state_dict())
    paths = [without_print(adapter(tmp_path / name, configs[name], [-1.5])) for name in order]
    surgery.merge_checkpoint(base, paths, tmp_path / "out", reversible=True)
    model = net(dtype)
    for name, path in zip(order, paths, strict=True):
        surgery.load(model, path, adapter_name=name)
    surgery.set_adapter(model, list(order))
    x = torch.linspace(-1, 1, 24).view(4, 6).to(dtype)
    with torch.no_grad():
        out, weight, bias = model(x), model[0].up.weight.clone(), model[0].up.bias.clone()
    surgery.eject(surgery.merge(model), keep_merged=True)
    room = 2 * 3 * (11 + 4) * torch.finfo(dtype).eps * max(4.0, float(out.abs().max()))
    assert float((model(x).detach() - out).abs().max()) <= room
    for held, wanted in ((model[0].up.weight, weight), (model[0].up.bias, bias)):
        assert held.dtype == wanted.dtype == dtype
        # Of the outcome, which is rounded once, and of a product of 2 terms in float32 and the steps, of size 8.
        room = torch.finfo(dtype).eps * wanted.abs() + 8 * 8 * torch.finfo(torch.float32).eps
        assert bool(((held - wanted).abs() <= room).all())
    assert tensor_hashes(read_tensors(tmp_path / "out")) == tensor_hashes(model.state_dict())
    report = surgery.verify_checkpoint(base, paths, tmp_path / "out")
    assert report.ok
    assert report.counts["rounding"] == 0
    assert not surgery.verify_checkpoint(base, paths[::-1], tmp_path / "out").ok
    surgery.unmerge_checkpoint(tmp_path / "out", tmp_path / "back")
    assert file_hashes(tmp_path / "back") == file_hashes(base)


@each_dtype
@pytest.mark.parametrize("cast", [None, "float32", "bfloat16"])
@pytest.mark.parametrize("weight", [1.0, 0.5, -1.0])
def test_factors_of_zero_and_below_come_back_from_any_dtype_at_any_weight(
    dtype: torch.dtype, cast: str | None, weight: float, tmp_path: Path
) -> None:
    base = write_base(tmp_path / "base", net(dtype).state_dict(), shards=3)
    path = without_print(adapter(tmp_path / "adapter", IA3Config(**TARGETS), [0.0, -0.0, -2.0, 1.0]))
    surgery.merge_checkpoint(base, [(path, weight)], tmp_path / "out", reversible=True, dtype=cast)
    surgery.unmerge_checkpoint(tmp_path / "out", tmp_path / "back")
    assert file_hashes(tmp_path / "back") == file_hashes(base)
    assert surgery.verify_checkpoint(base, [(path, weight)], tmp_path / "out").counts["different"] == 0


def test_a_weight_goes_so_much_of_the_way_from_base_to_merge(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", net(torch.float64).state_dict())
    path = without_print(adapter(tmp_path / "adapter", IA3Config(**TARGETS)))
    outs = {}
    for weight in (0.0, 0.5, 1.0, 2.0):
        surgery.merge_checkpoint(base, [(path, weight)], tmp_path / str(weight))
        outs[weight] = read_tensors(tmp_path / str(weight))
    tensors = read_tensors(base)
    for name in CHANGED:
        assert torch.equal(outs[0.0][name], tensors[name])
        change = outs[1.0][name] - tensors[name]
        for weight, out in outs.items():
            bound = 8 * torch.finfo(torch.float64).eps * (tensors[name].abs() + out[name].abs() + outs[1.0][name].abs())
            assert bool((((out[name] - tensors[name]) - weight * change).abs() <= bound).all())


def test_plan_and_receipt_name_the_biases(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", net().state_dict())
    path = adapter(tmp_path / "adapter", IA3Config(**TARGETS))
    plan = surgery.plan(base, path)
    told = {one["tensor"]: one for one in plan.to_json()["changes"]}
    assert told.keys() == CHANGED
    assert (told["0.up.bias"]["op"], told["0.up.weight"]["op"]) == ("bias", "linear")
    assert told["0.up.bias"]["methods"] == [{"method": "IA3", "scales": "output", "strength": (1.0).hex()}]
    assert told["0.down.weight"]["methods"][0]["scales"] == "input"
    receipt = surgery.merge_checkpoint(base, path, tmp_path / "out").receipt
    assert receipt["changed"].keys() == CHANGED


@pytest.mark.parametrize("name", ["0.up.bias", "1.down.weight"])
def test_one_element_that_is_off_is_different(name: str, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", net().state_dict())
    path = adapter(tmp_path / "adapter", IA3Config(**TARGETS))
    surgery.merge_checkpoint(base, path, tmp_path / "out")
    tensors = read_tensors(tmp_path / "out")
    tensors[name].view(-1)[1] *= 1 + 4 * torch.finfo(torch.float32).eps
    save_file(tensors, tmp_path / "out" / "model.safetensors")
    report = surgery.verify_checkpoint(base, path, tmp_path / "out")
    assert [found for found, one in report.tensors.items() if one.grade == "different"] == [name]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_factors_that_are_no_numbers_are_refused_and_nothing_changes(bad: float, tmp_path: Path) -> None:
    model = moved(surgery.inject(net(), IA3Config(**TARGETS)))
    with torch.no_grad():
        model[1].up.fitted["default"].params["l"][2].fill_(bad)
    surgery.save(model, tmp_path / "adapter")
    before = tensor_hashes(model.state_dict())
    with pytest.raises(ValueRangeError, match=r"1\.up: l holds NaN or infinity"):
        surgery.merge(model)
    assert tensor_hashes(model.state_dict()) == before
    base = write_base(tmp_path / "base", net().state_dict())
    with pytest.raises(ValueRangeError, match="NaN or infinity"):
        surgery.merge_checkpoint(base, tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_bias_that_another_module_holds_is_not_merged() -> None:
    model = net()
    model[1].up.bias = model[0].up.bias
    surgery.inject(model, IA3Config(target_modules=["0.up"], feedforward_modules=[]))
    with pytest.raises(MatchError, match=r"0\.up: its bias is tied to 1\.up"):
        surgery.merge(moved(model))
    surgery.eject(model)
    surgery.merge(moved(surgery.inject(model, IA3Config(target_modules=["0.up"], feedforward_modules=["0.up"]))))


def test_feedforward_modules_are_named_and_each_is_met(tmp_path: Path) -> None:
    with pytest.raises(MatchError, match="feedforward_modules: nothing matches 'dwon'"):
        surgery.inject(net(), IA3Config(target_modules=["up", "down"], feedforward_modules=["down", "dwon"]))
    with pytest.raises(MatchError, match="feedforward_modules: nothing matches"):
        surgery.inject(net(), IA3Config(target_modules=["up"], feedforward_modules=r".*down"))
    with pytest.raises(ConfigError, match="feedforward_modules is not given"):
        surgery.inject(net(), IA3Config(target_modules=["up"]))
    with pytest.raises(ConfigError, match="feedforward_modules"):
        IA3Config(target_modules=["up"], feedforward_modules="(")
    path = adapter(tmp_path / "adapter", IA3Config(**TARGETS))
    told = json.loads((path / "adapter_config.json").read_text())
    assert told["feedforward_modules"] == ["0.down", "1.down"]
    (path / "adapter_config.json").write_text(json.dumps(told | {"feedforward_modules": None}))
    with pytest.raises(FormatError, match="feedforward_modules is not given"):
        surgery.load(net(), path)


def test_a_name_that_ends_another_is_saved_as_what_it_is(tmp_path: Path) -> None:
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "xa": nn.Linear(3, 3)})
    surgery.inject(model, IA3Config(target_modules=["a", "xa"], feedforward_modules="a"))
    surgery.save(moved(model), tmp_path)
    told = json.loads((tmp_path / "adapter_config.json").read_text())
    assert told["feedforward_modules"] == "a"  # a list would hit both, in peft too
    again = surgery.load(nn.ModuleDict({"a": nn.Linear(3, 3), "xa": nn.Linear(3, 3)}), without_print(tmp_path))
    assert tuple(again["a"].fitted["default"].params["l"].shape) == (1, 3)
    assert tuple(again["xa"].fitted["default"].params["l"].shape) == (3, 1)


@pytest.mark.parametrize(
    ("entries", "wanted"),
    [
        (["1.*"], ["1.down"]),
        ([r"re:\d\.down"], ["0.down", "1.down"]),
        (["re:0.*", "down"], ["0.up", "0.down", "1.down"]),
        (r"re:.*\.up", ["0.up", "1.up"]),
    ],
    ids=str,
)
def test_feedforward_modules_may_be_globs_and_expressions(
    entries: str | list[str], wanted: list[str], tmp_path: Path
) -> None:
    targets = sorted({"0.up", "1.up", "0.down", "1.down"} - ({"1.up"} if "1.*" in entries else set()))
    model = surgery.inject(net(), IA3Config(target_modules=targets, feedforward_modules=entries))
    surgery.save(model, tmp_path)
    for one in (model, surgery.load(net(), tmp_path)):
        layers = {name: layer.fitted["default"] for name, layer in one.named_modules() if hasattr(layer, "fitted")}
        assert {name for name, fitted in layers.items() if fitted.method.feedforward} == {*wanted}


def test_a_glob_of_feedforward_modules_that_meets_nothing_is_refused_and_a_whole_name_means_no_other() -> None:
    for entry in ("2.*", r"re:down"):
        with pytest.raises(MatchError, match="feedforward_modules: nothing matches"):
            surgery.inject(net(), IA3Config(target_modules=["up", "down"], feedforward_modules=["down", entry]))
    with pytest.raises(MatchError, match=r"feedforward_modules: nothing matches '\*\.up'"):
        surgery.inject(net(), IA3Config(target_modules=["down"], feedforward_modules=["down", "*.up"]))
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "xa": nn.Linear(3, 3)})
    surgery.inject(model, IA3Config(target_modules=["a", "xa"], feedforward_modules=["re:a"]))
    assert [model[name].fitted["default"].method.feedforward for name in ("a", "xa")] == [True, False]


def test_an_embedding_is_refused_by_name_as_in_peft() -> None:
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 3))
    with pytest.raises(MatchError, match="0: an embedding"):
        surgery.inject(model, IA3Config(target_modules=["0", "1"], feedforward_modules=[]))
    assert type(model[0]) is nn.Embedding


@pytest.mark.parametrize("feedforward", [[], ["linear1"]])
def test_the_fast_path_of_a_transformer_layer_feels_the_factors(feedforward: list[str]) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0).eval()
    surgery.inject(layer, IA3Config(target_modules=["linear1"], feedforward_modules=feedforward))
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        plain = layer(x)
        moved(layer)
    slow = layer(x).detach()  # with gradients the layer calls its children
    layer.requires_grad_(False)
    fast, merged = layer(x), surgery.merge(layer)(x)
    room = 64 * torch.finfo(torch.float32).eps * float(slow.abs().max())
    assert max(float((one - slow).abs().max()) for one in (fast, merged)) <= room
    assert float((fast - plain).abs().max()) > 1000 * room


def test_an_undo_record_of_factors_costs_less_than_a_bit_a_parameter(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = write_base(tmp_path / "base", {"up.weight": torch.randn(256, 256).bfloat16()})
    config = IA3Config(target_modules=["up"], feedforward_modules=[]).to_json()
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    factors = {"base_model.model.up.ia3_l": 1 + torch.randn(256, 1) / 10}
    save_file(factors, tmp_path / "adapter" / "adapter_model.safetensors")
    surgery.merge_checkpoint(base, tmp_path / "adapter", tmp_path / "out", reversible=True)
    assert 0 < (tmp_path / "out" / "surgery.undo" / "streams-0").stat().st_size < 256 * 256 / 8
    surgery.unmerge_checkpoint(tmp_path / "out", tmp_path / "back")
    assert file_hashes(tmp_path / "back") == file_hashes(base)


def test_a_layout_that_one_factor_contradicts_is_not_taken_for_a_square_weight(tmp_path: Path) -> None:
    weights = {"up.weight": torch.randn(10, 6), "same.weight": torch.randn(6, 6)}
    base = write_base(tmp_path / "base", weights)
    told = IA3Config(target_modules=["up", "same"], feedforward_modules=[], fan_in_fan_out=True).to_json()
    path = tmp_path / "adapter"
    path.mkdir()
    (path / "adapter_config.json").write_text(json.dumps(told))
    factors = {name.removesuffix("weight"): torch.randn(len(values), 1) for name, values in weights.items()}
    spelled = {f"base_model.model.{name}ia3_l": values for name, values in factors.items()}
    save_file(spelled, path / "adapter_model.safetensors")
    with pytest.raises(MatchError, match="same: its weight is square"):
        surgery.merge_checkpoint(base, path, tmp_path / "out")
    surgery.merge_checkpoint(base, path, tmp_path / "out", ops={"same": "linear"})
    found = read_tensors(tmp_path / "out")["same.weight"].double()
    wanted = weights["same.weight"].double() * factors["same."].double()
    assert torch.equal(found, wanted.float().double())


def test_training_moves_the_factors_and_nothing_else_and_what_is_saved_is_what_was_trained(tmp_path: Path) -> None:
    model, x = surgery.inject(net(), IA3Config(**TARGETS)), torch.randn(32, 6)
    before, goal = {name: values.clone() for name, values in model.state_dict().items()}, torch.randn(32, 6)
    assert torch.equal(model(x), net()(x))
    optimizer = torch.optim.AdamW([values for values in model.parameters() if values.requires_grad], lr=0.05)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = (model(x) - goal).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    after = model.state_dict()
    assert {name for name in before if not torch.equal(after[name], before[name])} == {
        n for n in before if "ia3_l" in n
    }
    surgery.save(model, tmp_path)
    assert torch.equal(surgery.load(net(), tmp_path)(x), model(x))
