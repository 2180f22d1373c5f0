"""Biases of the base that an adapter trains (`bias` "all" and "lora_only"), through every procedure and beside peft."""

import copy
from pathlib import Path

import peft
import pytest
import torch
from checkpoint_folders import file_hashes, read_tensors, rewrite, tensor_hashes, write_base
from safetensors.torch import load_file
from torch import Tensor, nn

import surgery
from surgery import AdaLoraConfig, ConfigError, FormatError, LoraConfig, MatchError, ShapeError, StateError
from surgery.adapters.peft import read_adapter
from surgery.hosts.twin import as_stored, twin
from surgery.layers.trained_bias import trained_bias
from surgery.procedures.live.merged_state import merged_state
from surgery.procedures.live.refill import refill
from surgery.procedures.live.remove import remove
from surgery.procedures.live.save import tensors_of

TENSORS = "adapter_model.safetensors"
EXTRA = {"head.modules_to_save.bias", "head.original_module.bias"}  # that PEFT writes besides head.bias
KINDS = {
    "all": {"bias": "all"},
    "lora_only": {"bias": "lora_only"},
    "beside lora_bias": {"bias": "all", "lora_bias": True, "target_modules": ["fc"]},
    "under DoRA": {"bias": "lora_only", "use_dora": True, "target_modules": ["fc"]},
    "beside modules_to_save": {"bias": "all", "modules_to_save": ["head"]},
}
each_kind = pytest.mark.parametrize("kind", list(KINDS))
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


class Net(nn.Module):
    """Biases of every kind: adapted, of a norm, of a plain layer, within an attention layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.fc = nn.Embedding(11, 8), nn.LayerNorm(8), nn.Linear(8, 8)
        self.attention, self.out, self.head = nn.MultiheadAttention(8, 2), nn.Linear(8, 8, bias=False), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.fc(self.norm(self.embed(x))))
        return self.head(self.out(self.attention(h, h, h)[0]))


def net(dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(0)
    made = Net()
    for name, values in made.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(values)
    return made.to(dtype).eval()


def fields(kind: str) -> dict[str, object]:
    return {"r": 2, "lora_alpha": 4, "target_modules": ["fc", "out"], "init_lora_weights": False} | KINDS[kind]


def room(dtype: torch.dtype, out: Tensor) -> float:
    """Of five layers of at most 11 terms, each sum rounded once, in either order."""
    return 5 * 2 * (11 + 4) * torch.finfo(dtype).eps * max(1.0, float(out.abs().max()))


@pytest.fixture
def x() -> Tensor:
    return torch.arange(8).view(2, 4)


@pytest.fixture
def theirs(tmp_path: Path, kind: str) -> peft.PeftModel:
    """A model of peft whose adapter has been trained, saved in `theirs`."""
    torch.manual_seed(1)
    model = peft.get_peft_model(net(), peft.LoraConfig(**fields(kind))).eval()
    with torch.no_grad():
        for values in model.parameters():
            values.add_(torch.randn_like(values) / 8 if values.requires_grad else 0)
    model.save_pretrained(tmp_path / "theirs")
    return model


@each_kind
def test_files_go_both_ways_with_the_same_tensors_and_outputs(
    theirs: peft.PeftModel, x: Tensor, tmp_path: Path
) -> None:
    ours = surgery.load(net(), tmp_path / "theirs")
    out = ours(x).detach()
    assert float((out - theirs(x)).abs().max()) <= room(torch.float32, out)
    assert float((out - net()(x)).abs().max()) > room(torch.float32, out)
    surgery.save(ours, tmp_path / "ours")
    found, wanted = (load_file(tmp_path / one / TENSORS) for one in ("ours", "theirs"))
    assert {name.removeprefix("base_model.model.") for name in wanted.keys() ^ found.keys()} <= EXTRA
    assert all(torch.equal(values, wanted[name]) for name, values in found.items())
    back = peft.PeftModel.from_pretrained(net(), tmp_path / "ours").eval()
    assert torch.equal(back(x), theirs(x))


@each_kind
def test_the_same_parameters_are_trained_as_in_peft(kind: str, theirs: peft.PeftModel) -> None:
    ours = surgery.inject(net(), LoraConfig(**fields(kind)))
    found = {name for name, values in ours.named_parameters() if values.requires_grad}
    named = (name for name, values in theirs.named_parameters() if values.requires_grad)
    assert found == {name.removeprefix("base_model.model.") for name in named}


@pytest.mark.usefixtures("theirs")
@each_kind
@each_dtype
def test_merges_live_and_streaming_agree_and_come_back(dtype: torch.dtype, x: Tensor, tmp_path: Path) -> None:
    base, adapter = write_base(tmp_path / "base", net(dtype).state_dict()), tmp_path / "theirs"
    model = surgery.load(net(dtype), adapter)
    before, out = tensor_hashes(model.state_dict()), model(x).detach()
    surgery.merge(model)
    assert float((model(x).detach() - out).abs().max()) <= room(dtype, out)
    surgery.unmerge(model)
    assert tensor_hashes(model.state_dict()) == before
    with merged_state(model) as saved:
        hashes = tensor_hashes(saved)
    with surgery.disable_adapters(model):
        assert torch.equal(model(x), net(dtype)(x))
    assert torch.equal(model(x), out)
    surgery.merge_checkpoint(base, adapter, tmp_path / "out", reversible=True)
    surgery.verify_checkpoint(base, adapter, tmp_path / "out").require()
    merged = surgery.eject(surgery.merge(model), keep_merged=True)
    assert tensor_hashes(read_tensors(tmp_path / "out")) == tensor_hashes(merged.state_dict())
    assert hashes == tensor_hashes(merged.state_dict())
    surgery.unmerge_checkpoint(tmp_path / "out", tmp_path / "back")
    assert file_hashes(tmp_path / "back") == file_hashes(base)


@each_kind
def test_a_merge_by_peft_passes_verify_and_one_without_a_bias_does_not(theirs: peft.PeftModel, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", net().state_dict())
    merged = theirs.merge_and_unload().state_dict()
    surgery.verify_checkpoint(base, tmp_path / "theirs", write_base(tmp_path / "out", merged)).require()
    wrong = write_base(tmp_path / "wrong", merged | {"fc.bias": net().fc.bias.detach()})
    report = surgery.verify_checkpoint(base, tmp_path / "theirs", wrong)
    assert [name for name, one in report.tensors.items() if one.grade == "different"] == ["fc.bias"]


@pytest.mark.usefixtures("theirs")
@pytest.mark.parametrize("kind", ["all"])
def test_ejecting_and_deleting_bring_back_the_very_parameters(tmp_path: Path) -> None:
    for take in (surgery.eject, lambda model: remove(model, ["default"])):
        model = net()
        held, hashes = dict(model.named_parameters()), tensor_hashes(model.state_dict())
        take(surgery.load(model, tmp_path / "theirs"))
        assert {name: id(one) for name, one in model.named_parameters()} == {
            name: id(one) for name, one in held.items()
        }
        assert tensor_hashes(model.state_dict()) == hashes


@pytest.mark.usefixtures("theirs")
@pytest.mark.parametrize("kind", ["all"])
def test_both_biases_move_and_are_copied_with_the_model(x: Tensor, tmp_path: Path) -> None:
    model = copy.deepcopy(surgery.load(net(), tmp_path / "theirs")).double()
    with surgery.disable_adapters(model):
        assert torch.equal(model(x), net().double()(x))
        model.bfloat16()
    assert model(x).dtype == torch.bfloat16
    surgery.save(model, tmp_path / "cast")
    again = surgery.load(net(torch.bfloat16), tmp_path / "cast")
    assert torch.equal(again.norm.bias, model.norm.bias)
    assert torch.equal(trained_bias(again.head), trained_bias(model.head))


@pytest.mark.usefixtures("theirs")
@pytest.mark.parametrize("kind", ["all"])
def test_a_twin_has_the_biases_that_run_and_no_other(x: Tensor, tmp_path: Path) -> None:
    model = surgery.load(net(), tmp_path / "theirs")
    made = twin(model, as_stored)
    assert made.state_dict().keys() == net().state_dict().keys()
    assert torch.equal(made.norm.bias, trained_bias(model.norm))
    with surgery.disable_adapters(model):
        assert torch.equal(twin(model, as_stored)(x), net()(x))


@pytest.mark.usefixtures("theirs")
@pytest.mark.parametrize("kind", ["all"])
def test_it_is_saved_out_of_a_state_dict_and_loaded_in_place(x: Tensor, tmp_path: Path) -> None:
    model = surgery.load(net(), tmp_path / "theirs", trainable=True)
    with surgery.disable_adapters(model):
        state = {name: values.clone() for name, values in model.state_dict().items()}
    assert tensor_hashes(tensors_of(model, "default", state)) == tensor_hashes(tensors_of(model, "default"))
    held, out = trained_bias(model.norm), model(x)
    with torch.no_grad():
        held.zero_()
    refill(model, read_adapter(tmp_path / "theirs"), "default")
    assert model.norm.bias is held
    assert torch.equal(model(x), out)


def test_two_modules_that_share_a_bias_share_the_trained_one(tmp_path: Path) -> None:
    def tied() -> nn.Sequential:
        torch.manual_seed(0)
        made = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        made[1].bias = made[0].bias
        return made

    model = surgery.inject(tied(), LoraConfig(r=2, target_modules=["0"], bias="all"))
    assert model[0].base_layer.bias is model[1].bias
    nn.init.normal_(model[1].bias)
    surgery.save(model, tmp_path / "adapter")
    state = {name: values for name, values in tied().state_dict().items() if name != "1.bias"}
    surgery.merge_checkpoint(write_base(tmp_path / "base", state), tmp_path / "adapter", tmp_path / "out")
    assert torch.equal(read_tensors(tmp_path / "out")["0.bias"], model[1].bias)
    back = peft.PeftModel.from_pretrained(tied(), tmp_path / "adapter")
    assert torch.equal(back(torch.ones(1, 4)), model(torch.ones(1, 4)))


def test_adalora_trains_them_too_and_peft_reads_it(x: Tensor, tmp_path: Path) -> None:
    config = AdaLoraConfig(init_r=2, target_r=1, total_step=9, target_modules=["fc"], bias="all")
    model = surgery.inject(net(), config)
    nn.init.normal_(model.norm.bias)
    nn.init.normal_(model.fc.base_layer.bias)
    surgery.save(model, tmp_path / "adapter")
    back = peft.PeftModel.from_pretrained(net(), tmp_path / "adapter").eval()
    out = model(x)
    assert float((back(x) - out).abs().max()) <= room(torch.float32, out)


def test_one_adapter_of_a_model_trains_biases_as_in_peft() -> None:
    first, second = ({"r": 2, "target_modules": ["fc"], "bias": "all"} for _ in range(2))
    theirs = peft.get_peft_model(net(), peft.LoraConfig(**first))
    with pytest.raises(ValueError, match="only 1 adapter with bias"):
        theirs.add_adapter("b", peft.LoraConfig(**second))
    ours = surgery.inject(net(), LoraConfig(**first))
    with pytest.raises(StateError, match="one adapter of a model can"):
        surgery.inject(ours, LoraConfig(**second), adapter_name="b")
    surgery.inject(ours, LoraConfig(**second | {"bias": "none"}), adapter_name="b")
    with pytest.raises(StateError, match="another adapter trains its bias"):
        surgery.inject(ours, LoraConfig(**second | {"bias": "none", "modules_to_save": ["head"]}), adapter_name="c")
    with pytest.raises(StateError, match="no rows are known"), surgery.mixed_batch(ours, ["default", "b"]):
        pass
    other = surgery.inject(net(), LoraConfig(r=2, target_modules=["fc"], modules_to_save=["head"]))
    with pytest.raises(StateError, match="so that its bias cannot be trained"):
        surgery.inject(other, LoraConfig(**second), adapter_name="b")


@pytest.mark.parametrize(
    ("changed", "error", "told"),
    [
        ({"fc.base_layer.bias": None}, MatchError, "bias is 'all', and fc.bias is not in it"),
        ({"fc.base_layer.bias": torch.zeros(3)}, ShapeError, r"fc.bias is \[3\]"),
        ({"there.bias": torch.zeros(3)}, MatchError, "there.bias is not in the"),
        ({"fc.lora_B.bias": torch.zeros(8)}, FormatError, "no place for .*lora_B.bias"),
        ({"fc.bias": torch.zeros(8)}, FormatError, "two tensors are fc.bias"),
    ],
    ids=["missing", "another shape", "of no module", "of B", "twice"],
)
@pytest.mark.usefixtures("theirs")
@pytest.mark.parametrize("kind", ["all"])
def test_files_that_do_not_fit_are_refused(
    changed: dict[str, Tensor | None], error: type[Exception], told: str, tmp_path: Path
) -> None:
    rewrite(tmp_path / "theirs" / TENSORS, {f"base_model.model.{name}": values for name, values in changed.items()})
    with pytest.raises(error, match=told):
        surgery.load(net(), tmp_path / "theirs")
    base = write_base(tmp_path / "base", net().state_dict())
    with pytest.raises(error, match=told):
        surgery.merge_checkpoint(base, tmp_path / "theirs", tmp_path / "out")


def test_what_cannot_be_is_refused() -> None:
    for given in ("some", None, True):
        with pytest.raises(ConfigError, match="'none', 'all' or 'lora_only' is wanted"):
            LoraConfig(target_modules=["fc"], bias=given)
    with pytest.raises(ConfigError, match="goes with bias 'none' alone"):
        LoraConfig(target_parameters=["fc.weight"], bias="all")
    root = net()
    root.bias = nn.Parameter(torch.zeros(1))
    with pytest.raises(MatchError, match="the model itself holds one"):
        surgery.inject(root, LoraConfig(target_modules=["fc"], bias="all"))
