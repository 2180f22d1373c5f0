"""Parameters that are adapted by themselves: what reads them, what is refused, and what stands on files."""

import copy
from pathlib import Path

import pytest
import torch
from checkpoint_folders import read_tensors, write_adapter, write_base
from quantized_folders import experts_base
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import surgery
from surgery.codecs.mxfp4 import Mxfp4
from surgery.core.arithmetic import exact_product
from surgery.core.codec import Packed
from surgery.core.op import WHOLE
from surgery.core.site import Site, TensorInfo
from surgery.core.source import TILE_ELEMENTS
from surgery.errors import ConfigError, FormatError, InputError, MatchError, StateError
from surgery.methods import METHODS
from surgery.ops import ROLES
from surgery.ops.experts import parameter_op
from surgery.procedures.live.save import tensors_of


class Bank(nn.Module):
    """A stack [3, out, in] and two matrices, with a layer in it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 5, 4))
        self.gain = nn.Parameter(torch.randn(5, 5))
        self.bias = nn.Parameter(torch.randn(5))
        self.inner = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(torch.einsum("bi,eoi->bo", x, self.weight) @ self.gain + self.bias)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(2, 2))
        self.bank = Bank()
        self.again = self.bank  # the same module at two paths
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.bank(x) + self.again(x)) @ self.scale


def made() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


X = torch.linspace(-1, 1, 12).view(3, 4)


def lora(*parameters: str, **fields: object) -> surgery.LoraConfig:
    return surgery.LoraConfig(**{"r": 2, "target_parameters": parameters, "init_lora_weights": False} | fields)


@pytest.mark.parametrize("transposed", [False, True], ids=["out, in", "in, out"])
def test_each_expert_has_its_own_factors_whatever_the_tiles(transposed: bool) -> None:
    torch.manual_seed(0)
    stack, out, in_features, r = 3, 5, 4, 2
    shape = (stack, in_features, out) if transposed else (stack, out, in_features)
    site = Site("x.w", {"weight": TensorInfo("x.w", torch.float32, shape)}, parameter_op("w", shape, transposed))
    method = METHODS["LORA"](r=r).method("x.w")
    p = {role: torch.randn(spec.shape) for role, spec in method.tensors(site).items()}
    matrices = method.matrices(p, site)
    # As PEFT has it: A goes expert by expert, B's columns run over the experts first.
    A, B = p["A"].reshape(stack, r, in_features), p["B"].reshape(out, r, stack)
    each = [exact_product(B[:, :, expert].contiguous(), A[expert]) for expert in range(stack)]
    wanted = torch.stack(each) * method.scaling
    found = method.delta(matrices, WHOLE, exact_product)
    stored = (wanted.mT if transposed else wanted).reshape(found.shape)
    assert torch.equal(found, stored)
    spread = torch.cat([method.spread(matrices, site.acting.tile(slice(at, at + 1))) for at in range(len(found))])
    for step in (1, 2, 7, 99):
        tiles = [slice(at, min(at + step, len(found))) for at in range(0, len(found), step)]
        parts = [method.delta(matrices, site.acting.tile(rows), exact_product) for rows in tiles]
        assert torch.equal(torch.cat(parts), found)
        bounds = [method.spread(matrices, site.acting.tile(rows)) for rows in tiles]
        torch.testing.assert_close(torch.cat(bounds), spread, rtol=8 * 2.0**-52, atol=0.0)
    again = ROLES[site.acting.name].over(shape)
    assert again == site.acting
    assert torch.equal(again.matrix(torch.arange(60.0).view(shape)), torch.arange(60.0).view(site.shape))


def test_a_module_reads_what_the_adapters_make_of_its_parameter_at_every_path() -> None:
    model = made()
    before = model(X)
    ours = surgery.inject(made(), lora("bank.weight", init_lora_weights=True))
    assert torch.equal(ours(X), before)
    ours = surgery.inject(made(), lora("bank.weight", "gain"))
    assert ours.bank is ours.again
    bank = made().bank
    with torch.no_grad():
        bank.weight.copy_(ours.bank.weight)
        bank.gain.copy_(ours.bank.gain)
    assert not torch.equal(bank.weight, made().bank.weight)
    assert torch.equal(bank(X), ours.bank(X))
    assert torch.equal(ours.bank.bias, bank.bias)
    with surgery.disable_adapters(ours):
        assert torch.equal(ours(X), before)
    assert not torch.equal(ours(X), before)


def test_a_merge_is_undone_to_the_bit_and_the_very_modules_come_back() -> None:
    model = made()
    modules, state = dict(model.named_modules()), {name: v.clone() for name, v in model.state_dict().items()}
    ours = surgery.inject(model, lora("bank.weight", "gain", "head.weight"))
    surgery.inject(ours, lora("gain"), adapter_name="b")
    surgery.set_adapter(ours, ["default", "b"])
    adapted = ours(X)
    surgery.merge(ours)
    torch.testing.assert_close(
        ours(X), adapted, rtol=0.0, atol=2 * 60 * 2.0**-21 * float(adapted.detach().abs().max() + 9)
    )
    surgery.unmerge(ours)
    assert torch.equal(ours(X), adapted)
    surgery.eject(ours)
    assert {name: id(module) for name, module in model.named_modules()} == {n: id(m) for n, m in modules.items()}
    assert all(torch.equal(values, state[name]) for name, values in model.state_dict().items())
    assert all(values.requires_grad for values in model.parameters())


def test_a_second_adapter_is_trained_alone_and_a_saved_one_is_loaded_again(tmp_path: Path) -> None:
    ours = surgery.inject(made(), lora("bank.weight", "bank.gain"))
    optimizer = torch.optim.SGD([one for one in ours.parameters() if one.requires_grad], lr=0.1)
    ours(X).square().sum().backward()
    optimizer.step()
    changed = {name for name, one in ours.named_parameters() if one.grad is not None}
    assert changed == {f"bank.{inner}lora_{role}.default.weight" for inner in ("", "base_layer.") for role in "AB"}
    surgery.save(ours, tmp_path)
    told, found = tensors_of(ours, "default"), tensors_of(ours, "default", ours.state_dict())
    assert told.keys() == found.keys()
    assert all(torch.equal(values, found[name]) for name, values in told.items())
    assert torch.equal(surgery.load(made(), tmp_path)(X), ours(X))
    other = made()
    with torch.no_grad():
        other.bank.gain[0, 0] += 1
    with pytest.raises(MatchError, match=r"trained on another base: bank\.gain"):
        surgery.load(other, tmp_path)


REFUSED = {
    "nothing": (lora("bank.none"), MatchError, r"target_parameters: nothing matches 'bank\.none'"),
    "a vector": (lora("bank.bias"), MatchError, r"bank\.bias: \[5\] in float32; floats of two or three axes"),
    "the model's own": (
        lora("scale", "gain"),
        MatchError,
        r"target_parameters: scale is held by the model itself|nothing matches 'scale'",
    ),
    "a layer as a whole": (
        lora("head.weight", target_modules=["head"]),
        MatchError,
        "head: parameters of it are adapted",
    ),
    "what holds a layer": (lora("gain", target_modules=["inner"]), MatchError, r"bank: .* and so is bank\.inner"),
    "what is saved": (lora("gain", modules_to_save=["inner"]), MatchError, r"bank: .* and so is bank\.inner"),
    "what is within": (lora("gain", "inner.weight"), MatchError, r"bank: .* and so is bank\.inner"),
    "orthogonal": (lora("bank.weight", init_lora_weights="orthogonal"), ConfigError, "of one matrix"),
}


@pytest.mark.parametrize(("config", "kind", "told"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_is_refused_and_nothing_changes(config: surgery.LoraConfig, kind: type, told: str) -> None:
    model = made()
    before = [(name, id(module)) for name, module in model.named_modules()]
    with pytest.raises(kind, match=told):
        surgery.inject(model, config)
    assert [(name, id(module)) for name, module in model.named_modules()] == before


def test_settings_that_peft_refuses_too_are_refused() -> None:
    for fields in ({"use_dora": True}, {"lora_bias": True}, {"lora_dropout": 0.1}):
        with pytest.raises(ConfigError, match="target_parameters is given; as in PEFT it goes without"):
            lora("gain", **fields)
    ours = surgery.inject(made(), lora("gain"))
    with (
        pytest.raises(StateError, match="whose weights are read, not called"),
        surgery.mixed_batch(ours, ["default"] * 3),
    ):
        ours(X)
    with pytest.raises(MatchError, match=r"bank: parameters of it are adapted, and so is bank\.inner"):
        surgery.inject(ours, surgery.LoraConfig(target_modules=["inner"]), adapter_name="b")


def test_files_in_which_parameters_cannot_be_told_apart_are_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"m": nn.Module()})
    model["m"].one, model["m"].two = (nn.Parameter(torch.randn(3, 5, 4)) for _ in range(2))
    (tmp_path / "base").mkdir()
    save_file(model.state_dict(), tmp_path / "base/model.safetensors")
    ours = surgery.inject(model, lora("one", "two"))
    surgery.save(ours, tmp_path / "adapter")
    with pytest.raises(MatchError, match=r"(one|two) and another parameter of its module have equal shapes"):
        surgery.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    weights = tmp_path / "adapter/adapter_model.safetensors"
    held = load_file(weights)
    save_file({name: one for name, one in held.items() if ".base_layer." not in name}, weights)
    for read in (
        lambda: surgery.load(copy.deepcopy(surgery.eject(ours)), tmp_path / "adapter"),
        lambda: surgery.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out"),
    ):
        with pytest.raises(FormatError, match="m: target_parameters means one, two, and there are tensors for 1"):
            read()


def test_an_adapter_of_another_shape_is_refused(tmp_path: Path) -> None:
    surgery.save(surgery.inject(made(), lora("bank.weight")), tmp_path / "adapter")
    other = made()
    other.bank.weight = nn.Parameter(torch.randn(2, 5, 4))
    (tmp_path / "base").mkdir()
    save_file({"bank.weight": other.bank.weight.detach()}, tmp_path / "base/model.safetensors")
    found = r"trained on another base: bank.weight was \[3, 5, 4\] there, and here \[2, 5, 4\]"
    for told in (found, r"A is \[6, 4\], but \[4, 4\] is wanted"):
        with pytest.raises(InputError, match=told):
            surgery.load(other, tmp_path / "adapter")
        with pytest.raises(InputError, match=told):
            surgery.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
        (tmp_path / "adapter/surgery.base.json").unlink(missing_ok=True)


def test_a_stack_larger_than_a_tile_is_merged_a_part_of_an_expert_at_a_time(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"m": nn.Module()})
    model["m"].stack = nn.Parameter(torch.randn(2, TILE_ELEMENTS // 500 + 200, 500))
    assert model["m"].stack[0].numel() > TILE_ELEMENTS
    (tmp_path / "base").mkdir()
    save_file(model.state_dict(), tmp_path / "base/model.safetensors")
    ours = surgery.inject(model, lora("stack"))
    surgery.save(ours, tmp_path / "adapter")
    surgery.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", reversible=True)
    surgery.eject(surgery.merge(ours), keep_merged=True)
    assert torch.equal(load_file(tmp_path / "out/model.safetensors")["m.stack"], model["m"].stack)
    assert (
        surgery.verify_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out").tensors["m.stack"].grade
        == "bits"
    )
    surgery.unmerge_checkpoint(tmp_path / "out", tmp_path / "back")
    assert (tmp_path / "back/model.safetensors").read_bytes() == (tmp_path / "base/model.safetensors").read_bytes()


def test_a_stack_in_mxfp4_is_merged_as_the_plain_one_that_it_is_decoded_to(tmp_path: Path) -> None:
    name, base = "model.layers.0.mlp.experts", experts_base(tmp_path / "packed")
    torch.manual_seed(0)
    factors = {f"{name}.lora_A.weight": torch.randn(6, 64), f"{name}.lora_B.weight": torch.randn(10, 6)}
    fields = {"r": 2, "target_modules": [], "target_parameters": ["experts.gate_up_proj"]}
    write_adapter(tmp_path / "adapter", factors, **fields)
    surgery.merge_checkpoint(base, tmp_path / "adapter", tmp_path / "out", reversible=True)
    surgery.verify_checkpoint(base, tmp_path / "adapter", tmp_path / "out").require()
    held = read_tensors(base)
    packed = {role: held.pop(f"{name}.gate_up_proj_{role}") for role in ("blocks", "scales")}
    plain = {**held, f"{name}.gate_up_proj": Mxfp4().decode(Packed(packed), torch.bfloat16)}
    write_base(tmp_path / "plain", plain, config={"model_type": "gpt_oss", "dtype": "bfloat16"})
    surgery.merge_checkpoint(tmp_path / "plain", tmp_path / "adapter", tmp_path / "merged")
    found, wanted = read_tensors(tmp_path / "out"), read_tensors(tmp_path / "merged")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[one], wanted[one]) for one in wanted)
    assert not torch.equal(found[f"{name}.gate_up_proj"], plain[f"{name}.gate_up_proj"])
    surgery.unmerge_checkpoint(tmp_path / "out", tmp_path / "back")
    assert (tmp_path / "back/model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()


def test_it_is_compiled_in_one_piece() -> None:
    ours = surgery.inject(made(), lora("bank.weight", "gain", target_modules=["head"]))
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(X), ours(X))
    assert not torch.equal(compiled(X), made()(X))
