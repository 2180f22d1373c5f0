"""Tensors that all sites of an adapter share: one in memory, in a model and in files; whole in an undo record."""

import copy
import io
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_folders import rewrite, tensor_hashes
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import surgery
from surgery import FormatError, ShapeError, ValueRangeError, VeraConfig
from surgery.adapters.peft import adapter_of, read_adapter
from surgery.hosts.tree import adapted_layers
from surgery.layers import SharedSlot
from surgery.procedures.live.load import lay
from surgery.procedures.live.refill import refill
from surgery.procedures.live.remove import remove
from surgery.procedures.live.save import tensors_of

FILE, TENSORS, CONFIG = "model.safetensors", "adapter_model.safetensors", "adapter_config.json"
TARGETS = ["up", "down"]


class Net(nn.Module):
    """Layers of which one has the most outputs and the other the most inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.out = nn.Linear(6, 10), nn.Linear(10, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.down(self.up(x).relu()))


def net() -> Net:
    torch.manual_seed(3)
    return Net()


def config(**fields: Any) -> VeraConfig:
    return VeraConfig(**({"r": 4, "target_modules": TARGETS} | fields))


def trained(model: Any) -> Any:
    with torch.no_grad():
        for name, values in model.named_parameters():
            if "vera_lambda" in name:
                values.add_(torch.randn_like(values) / 2)
    return model


def adapter(folder: Path, **fields: Any) -> Path:
    surgery.save(trained(surgery.inject(net(), config(**fields))), folder)
    return folder


def base(folder: Path) -> Path:
    folder.mkdir()
    save_file(net().state_dict(), folder / FILE)
    return folder


def held(model: nn.Module, adapter_name: str = "default") -> list[Tensor]:
    """A of each layer that the adapter lies over."""
    layers = adapted_layers(model).values()
    return [layer.vera_A[adapter_name] for layer in layers if adapter_name in layer.fitted]


@pytest.fixture
def x() -> Tensor:
    return torch.linspace(-1, 1, 24).view(4, 6)


MOVES = {
    "as it is": lambda model: model,
    "in another dtype": lambda model: model.double(),
    "copied": copy.deepcopy,
    "pickled": lambda model: pickle.loads(pickle.dumps(model)),  # our own bytes
    "saved by torch": lambda model: torch.load(saved(model), weights_only=False),
}


def saved(model: nn.Module) -> io.BytesIO:
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    return stream


@pytest.mark.parametrize("move", MOVES)
def test_a_model_holds_one_for_all_layers_wherever_it_goes(move: str, x: Tensor) -> None:
    model = trained(surgery.inject(net(), config()))
    wanted = model(x)
    moved = MOVES[move](model)
    first, second = held(moved)
    assert first is second
    assert first.shape == (4, 10)
    assert sum(values is first for _, values in moved.named_buffers()) == 1
    assert torch.equal(moved(x.to(first.dtype)).to(x.dtype), wanted) or move == "in another dtype"
    assert first.dtype == (torch.float64 if move == "in another dtype" else torch.float32)
    assert (first is held(model)[0]) == (move in {"as it is", "in another dtype"})


def test_a_state_dict_spells_it_at_each_layer_as_in_peft_and_is_loaded_strictly(x: Tensor) -> None:
    model, other = trained(surgery.inject(net(), config())), surgery.inject(net(), config(projection_prng_key=1))
    state = model.state_dict()
    names = [name for name in state if "vera_A" in name]
    assert names == ["up.vera_A.default", "down.vera_A.default"]
    assert len({state[name].data_ptr() for name in names}) == 1
    other.load_state_dict(state)
    assert torch.equal(other(x), model(x))
    assert held(other)[0] is held(other)[1]


def test_each_adapter_has_its_own_and_takes_it_along_when_it_goes(x: Tensor) -> None:
    model = trained(surgery.inject(net(), config()))
    surgery.inject(model, surgery.LoraConfig(r=2, target_modules=["up"]), adapter_name="beside")
    alone = model(x)
    surgery.inject(model, config(r=2, target_modules=["down", "out"], projection_prng_key=5), adapter_name="other")
    assert [one.shape for one in (held(model)[0], held(model, "other")[0])] == [(4, 10), (2, 10)]
    assert torch.equal(model(x), alone)
    surgery.set_adapter(model, ["default", "other"])
    assert torch.equal(model(x), alone)  # the other is fresh
    remove(model, ["default"])
    assert {name for name in model.state_dict() if "vera_A" in name} == {"down.vera_A.other", "out.vera_A.other"}
    remove(model, ["beside", "other"])
    assert type(model.up) is nn.Linear
    assert model.state_dict().keys() == net().state_dict().keys()


def test_the_record_of_a_live_merge_holds_one_copy_that_later_training_leaves_alone() -> None:
    model = trained(surgery.inject(net(), config()))
    original = net().state_dict()
    surgery.merge(model)
    records = [one.change.layers[0].params["A"] for layer in adapted_layers(model).values() for one in layer.merged]
    assert len(records) == 2
    assert records[0] is records[1]
    assert records[0] is not held(model)[0]
    with torch.no_grad():
        held(model)[0].zero_()
    back = surgery.eject(model).state_dict()
    assert all(torch.equal(back[name], original[name]) for name in original)


@pytest.mark.parametrize("keep", [True, False], ids=["kept", "drawn"])
def test_an_undo_record_holds_it_whatever_the_files_do(
    keep: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, there = adapter(tmp_path / "adapter", save_projection=keep), base(tmp_path / "base")
    assert ("base_model.vera_A" in load_file(given / TENSORS)) == keep
    surgery.merge_checkpoint(there, given, tmp_path / "out", reversible=True)
    surgery.verify_checkpoint(there, given, tmp_path / "out").require()
    receipt = json.loads((tmp_path / "out" / "surgery.receipt.json").read_text())
    assert ("drawn" in receipt["adapters"][0]) != keep
    assert any("vera_A and vera_B are not in it" in note for note in receipt["notes"]) != keep
    monkeypatch.setattr(VeraConfig, "drawn", lambda *_: pytest.fail("an undo draws nothing"))
    surgery.unmerge_checkpoint(tmp_path / "out", tmp_path / "back")
    assert (tmp_path / "back" / FILE).read_bytes() == (there / FILE).read_bytes()


def test_what_is_drawn_otherwise_fails_verify(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given, there = adapter(tmp_path / "adapter", save_projection=False), base(tmp_path / "base")
    surgery.merge_checkpoint(there, given, tmp_path / "out")
    drawn = VeraConfig.drawn

    def others(one: VeraConfig, sites: Any) -> dict[str, Tensor]:
        return {role: values.flip(0) for role, values in drawn(one, sites).items()}

    monkeypatch.setattr(VeraConfig, "drawn", others)
    assert not surgery.verify_checkpoint(there, given, tmp_path / "out").ok


def test_loading_what_has_to_be_drawn_says_so(tmp_path: Path) -> None:
    given = adapter(tmp_path / "adapter", save_projection=False)
    with pytest.warns(UserWarning, match="vera_A and vera_B are not in it: they are drawn from its seed"):
        surgery.load(net(), given)
    plan = surgery.plan(base(tmp_path / "base"), given)
    assert any("drawn from its seed" in note for note in plan.notes)


def damaged(folder: Path, changed: dict[str, Tensor | None], **fields: Any) -> Path:
    rewrite(folder / TENSORS, changed)
    told = json.loads((folder / CONFIG).read_text()) | fields
    (folder / CONFIG).write_text(json.dumps(told))
    return folder


DAMAGES: dict[str, tuple[type[Exception], str, dict[str, Any], dict[str, Any]]] = {
    "missing": (FormatError, "no base_model.vera_B in it", {"base_model.vera_B": None}, {}),
    "left out by the config": (FormatError, "base_model.vera_A is in it", {}, {"save_projection": False}),
    "too short": (ShapeError, r"A is \[4, 9\], but \[4, 10\], or longer along axis 1", {"vera_A": (4, 9)}, {}),
    "of another rank": (ShapeError, r"B is \[10, 5\]", {"vera_B": (10, 5)}, {}),
    "of more axes": (ShapeError, r"A is \[4, 10, 1\]", {"vera_A": (4, 10, 1)}, {}),
    "not finite": (ValueRangeError, "A holds NaN", {"base_model.vera_A": torch.full((4, 10), torch.nan)}, {}),
    "of a rank that the file has not": (
        ShapeError,
        r"d is \[4\], but \[1073741824\]",  # and nothing of that size is drawn
        {"base_model.vera_A": None, "base_model.vera_B": None},
        {"save_projection": False, "r": 1 << 30},
    ),
}


@pytest.mark.filterwarnings("ignore:.*drawn from its seed")
@pytest.mark.parametrize("case", DAMAGES)
@pytest.mark.parametrize("live", [True, False], ids=["live", "on files"])
def test_what_does_not_fit_is_refused(case: str, live: bool, tmp_path: Path) -> None:
    error, told, changed, fields = DAMAGES[case]
    given = {
        n if n[:4] == "base" else f"base_model.{n}": torch.zeros(v) if type(v) is tuple else v
        for n, v in changed.items()
    }
    folder = damaged(adapter(tmp_path / "adapter"), given, **fields)
    if live and case == "not finite":  # a model may hold it; its merge is refused
        with pytest.raises(error, match="NaN or infinity"):
            surgery.merge(surgery.load(net(), folder))
        return
    there, out = base(tmp_path / "base"), tmp_path / "out"
    with pytest.raises(error, match=told):
        _ = surgery.load(net(), folder) if live else surgery.merge_checkpoint(there, folder, out)
    assert not (tmp_path / "out").exists()


def test_one_that_is_larger_than_this_base_asks_is_used_in_part(tmp_path: Path, x: Tensor) -> None:
    given = adapter(tmp_path / "adapter")
    wanted = surgery.load(net(), given)(x)
    A, B = (load_file(given / TENSORS)[f"base_model.vera_{role}"] for role in "AB")
    wide = torch.cat([A, torch.full((4, 3), torch.nan)], 1).nan_to_num(9.0)
    high = torch.cat([B, torch.full((2, 4), 7.0)])
    rewrite(given / TENSORS, {"base_model.vera_A": wide, "base_model.vera_B": high})
    assert torch.equal(surgery.load(net(), given)(x), wanted)


def test_another_takes_its_place_in_the_same_memory(tmp_path: Path, x: Tensor) -> None:
    given = adapter(tmp_path / "adapter", projection_prng_key=9)
    model = trained(surgery.inject(net(), config()))
    before = held(model)[0]
    refill(model, read_adapter(given), "default")
    assert held(model)[0] is before
    assert torch.equal(model(x), surgery.load(net(), given)(x))


@pytest.mark.parametrize("trainable", [True, False])
def test_what_came_first_is_that_of_all_layers(trainable: bool) -> None:
    slot, found = SharedSlot(), []
    for values in (torch.ones(2), torch.zeros(2)):
        held, key = slot.put("default", "", values, True) if trainable else slot.fix("default", "", values)
        found.append(held[key])
    assert found[0] is found[1]
    assert isinstance(found[0], nn.Parameter) == trainable
    assert bool(found[0].all())


@pytest.mark.parametrize("kind", [VeraConfig, surgery.RandLoraConfig])
def test_a_state_dict_gives_the_tensors_of_files_and_both_are_read(kind: type, tmp_path: Path, x: Tensor) -> None:
    model = trained(surgery.inject(net(), kind(r=4, target_modules=TARGETS)))
    surgery.save(model, tmp_path)
    held, told = tensors_of(model, "default"), tensors_of(model, "default", model.state_dict())
    assert tensor_hashes(held) == tensor_hashes(told)
    written = load_file(tmp_path / TENSORS)
    assert {name.removeprefix("base_model.").removeprefix("model.") for name in written} == held.keys()
    other = net()
    lay(other, adapter_of(model.surgery_state.configs["default"], held, "held"))
    assert torch.equal(other(x), model(x))


def test_inspect_lists_it_once(tmp_path: Path) -> None:
    rows = [row.name for row in surgery.inspect(adapter(tmp_path / "adapter")).rows]
    assert rows == ["down b", "down d", "up b", "up d", "vera_A", "vera_B"]
