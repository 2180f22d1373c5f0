"""nn.MultiheadAttention: LoRA to peft and from it; what runs is what is merged; both are undone to the bit."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import peft
import pytest
import torch
from pairs import gradients, merge_live_and_on_files, saved, trainable
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import surgery
from surgery.errors import ConfigError, FormatError, MatchError, UsageError
from surgery.procedures.live.merged_state import merged_state

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Net(nn.Module):
    """An attention layer of its own, and one in an encoder layer, whose fast path reads the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(16, 4, batch_first=True)
        self.layer = nn.TransformerEncoderLayer(16, 4, dim_feedforward=8, dropout=0.0, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.attn(x, x.flip(1), value=x, need_weights=False)
        return self.head(self.layer(x + y))


FIELDS = {"r": 4, "lora_alpha": 8, "target_modules": ["attn", "self_attn", "head"], "init_lora_weights": False}
FIELDS |= {"rank_pattern": {"attn": 2}, "alpha_pattern": {"layer.self_attn": 16}}


def made(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return Net().to(dtype).eval()


def given(dtype: torch.dtype = torch.float32) -> Tensor:
    torch.manual_seed(2)
    return torch.randn(2, 5, 16, dtype=dtype)


def by_peft(folder: Path, dtype: torch.dtype = torch.float32) -> peft.PeftModel:
    torch.manual_seed(1)
    theirs = peft.get_peft_model(made(dtype), peft.LoraConfig(**FIELDS)).eval()
    theirs.save_pretrained(folder)
    return theirs


@contextmanager
def slow_path() -> Iterator[None]:
    """peft's adapters do nothing where an encoder layer takes its fast path, which reads the base's weights."""
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def near(wanted: Tensor, eps: float) -> dict[str, float]:
    """Of three layers with sums of at most 16 terms and rounded weights; the outcome is about 1 after a norm."""
    return {"rtol": 0.0, "atol": 3 * 16 * 4 * eps * float(wanted.abs().max() + 1)}


def test_an_adapter_saved_by_peft_gives_its_outputs_here_and_back_again(tmp_path: Path) -> None:
    theirs = by_peft(tmp_path / "theirs")
    ours = surgery.load(made(), tmp_path / "theirs")
    with slow_path():
        wanted, eps = theirs(given()).detach(), torch.finfo(torch.float32).eps
    torch.testing.assert_close(ours(given()), wanted, **near(wanted, eps))
    assert float((made()(given()) - wanted).detach().abs().max()) > 100 * near(wanted, eps)["atol"]
    surgery.save(ours, tmp_path / "ours")
    found, written = (load_file(tmp_path / one / TENSORS) for one in ("ours", "theirs"))
    assert found.keys() == written.keys()
    assert "base_model.model.attn.base_layer.out_proj.lora_A.weight" in found
    assert all(torch.equal(found[name], written[name]) for name in written)
    again = peft.PeftModel.from_pretrained(made(), tmp_path / "ours").eval()
    with slow_path():
        torch.testing.assert_close(again(given()), wanted, **near(wanted, eps))


def test_a_config_hits_the_same_modules_with_the_same_names_and_shapes_as_in_peft(tmp_path: Path) -> None:
    wanted = trainable(peft.get_peft_model(made(), peft.LoraConfig(**FIELDS)))
    ours = surgery.inject(made(), surgery.LoraConfig(**FIELDS))
    assert trainable(ours) == wanted
    surgery.save(ours, tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["target_modules"] == ["attn", "head", "layer.self_attn"]


def test_gradients_are_those_of_peft_but_for_out_proj_where_they_are_those_of_the_forward(tmp_path: Path) -> None:
    theirs = by_peft(tmp_path)
    ours, found = surgery.load(made(), tmp_path, trainable=True), []
    for model in (theirs, ours):
        with slow_path():
            model(given()).square().sum().backward()
        found.append(gradients(model))
    assert found[1].keys() == found[0].keys()
    for name, values in found[0].items():
        # Of the two times that peft adds the delta of out_proj, autograd sees one; here B is twice that of the file.
        wanted = values * 2 if "out_proj.lora_A" in name else values
        torch.testing.assert_close(found[1][name], wanted, **near(wanted, torch.finfo(torch.float32).eps))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_live_merge_is_that_on_files_to_the_bit_and_both_are_undone(dtype: torch.dtype, tmp_path: Path) -> None:
    by_peft(tmp_path / "adapter", dtype)
    base, ours = saved(made(dtype), tmp_path / "base"), surgery.load(made(dtype), tmp_path / "adapter")
    changed = merge_live_and_on_files(base, tmp_path / "adapter", ours, tmp_path)
    wanted = {"in_proj_weight", "out_proj.weight"}
    assert changed == {"head.weight"} | {f"{path}.{name}" for path in ("attn", "layer.self_attn") for name in wanted}


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "fast path"])
def test_the_adapted_layers_compute_as_the_merged_ones(grad: bool, tmp_path: Path) -> None:
    by_peft(tmp_path)
    ours = surgery.load(made(), tmp_path, trainable=True)
    with torch.set_grad_enabled(grad):
        after = ours(given())
        surgery.merge(ours)
        # The grid of 22 bits costs r * 2^-21 of each product, in place of float32's rounding of it.
        torch.testing.assert_close(ours(given()), after, **near(after, 4 * 2.0**-21))


@pytest.mark.parametrize("safe", [False, True], ids=["merge", "safe_merge"])
def test_a_merge_by_peft_passes_verify_and_says_that_out_proj_counts_twice(safe: bool, tmp_path: Path) -> None:
    theirs, base = by_peft(tmp_path / "adapter"), saved(made(), tmp_path / "base")
    out = saved(theirs.merge_and_unload(safe_merge=safe), tmp_path / "out")
    surgery.verify_checkpoint(base, tmp_path / "adapter", out).require()
    report = surgery.merge_checkpoint(base, tmp_path / "adapter", tmp_path / "merged")
    told = [note for note in report.receipt["notes"] if "counts twice" in note]
    assert len(told) == 2
    before, after = (load_file(folder / "model.safetensors") for folder in (base, out))
    name = "attn.out_proj.weight"
    save_file(after | {name: (before[name] + after[name]) / 2}, out / "model.safetensors")
    judged = surgery.verify_checkpoint(base, tmp_path / "adapter", out).tensors.items()
    assert [judge for judge, one in judged if one.grade == "different"] == [name]


def test_the_state_that_a_merge_would_leave_is_named_as_without_adapters(tmp_path: Path) -> None:
    by_peft(tmp_path)
    ours = surgery.load(made(), tmp_path)
    with merged_state(ours) as found:
        told = {name: values.clone() for name, values in found.items()}
    wanted = surgery.eject(surgery.merge(ours), keep_merged=True).state_dict()
    assert told.keys() == wanted.keys()
    assert all(torch.equal(told[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("name", ["attn.in_proj_weight", "attn.out_proj.weight"])
def test_another_base_is_refused(name: str, tmp_path: Path) -> None:
    surgery.save(surgery.inject(made(), surgery.LoraConfig(r=2, target_modules=["attn"])), tmp_path)
    other = made()
    with torch.no_grad():
        other.get_parameter(name).view(-1)[5] += 1
    with pytest.raises(MatchError, match=f"trained on another base: {name}"):
        surgery.load(other, tmp_path)


def test_the_state_and_the_very_modules_come_back(tmp_path: Path) -> None:
    model = made()
    modules, state = dict(model.named_modules()), {name: v.clone() for name, v in model.state_dict().items()}
    ours = surgery.inject(model, surgery.LoraConfig(**FIELDS))
    surgery.inject(ours, surgery.LoraConfig(r=2, target_modules=["attn.out_proj"]), adapter_name="alone")
    surgery.save(ours, tmp_path)
    alone = load_file(tmp_path / "alone" / TENSORS)
    assert set(alone) == {f"base_model.model.attn.out_proj.lora_{factor}.weight" for factor in "AB"}
    surgery.eject(ours)
    assert {name: id(module) for name, module in model.named_modules()} == {n: id(m) for n, m in modules.items()}
    assert all(torch.equal(values, state[name]) for name, values in model.state_dict().items())


def test_a_fresh_adapter_changes_no_output_and_an_entry_for_out_proj_adds_nothing() -> None:
    before = made()(given())
    both = surgery.LoraConfig(r=4, target_modules=["attn", "out_proj", "self_attn"])
    ours = surgery.inject(made(), both)
    assert torch.equal(ours(given()), before)
    one = surgery.inject(made(), surgery.LoraConfig(r=4, target_modules=["attn", "self_attn"]))
    assert ours.state_dict().keys() == one.state_dict().keys()


def test_what_an_attention_layer_cannot_bear_is_refused_by_name(tmp_path: Path) -> None:
    apart = nn.ModuleDict({"attn": nn.MultiheadAttention(16, 4, kdim=8)})
    with pytest.raises(MatchError, match="weights of their own; name these in target_parameters"):
        surgery.inject(apart, surgery.LoraConfig(target_modules=["attn"]))
    with pytest.raises(ValueError, match="Only same embed for query/key/value is supported"):
        peft.get_peft_model(apart, peft.LoraConfig(target_modules=["attn"]))
    with pytest.raises(ConfigError, match=r"attn: lora_dropout is 0\.1"):
        surgery.inject(made(), surgery.LoraConfig(target_modules=["attn"], lora_dropout=0.1))
    with pytest.raises(MatchError, match="attn: an attention"):
        surgery.inject(made(), surgery.IA3Config(target_modules=["attn"], feedforward_modules=[]))
    by_peft(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(config | {"peft_version": "0.22.0"}))
    with pytest.raises(FormatError, match=r"out_proj: its delta counts twice up to peft_version 0\.21\.2"):
        surgery.load(made(), tmp_path)
    for scale in (0, 3, 2.5, True):
        with pytest.raises(UsageError, match="from 1 to 2 is wanted"):
            surgery.load(made(), tmp_path, mha_out_proj_scale=scale)
    (tmp_path / CONFIG).write_text(json.dumps(config))
    tensors = load_file(tmp_path / TENSORS)
    save_file({name: values for name, values in tensors.items() if ".attn.lora_" not in name}, tmp_path / TENSORS)
    with pytest.raises(FormatError, match="the file is incomplete"):
        surgery.load(made(), tmp_path)


def merged_by(folder: Path, scale: int | None) -> Tensor:
    """The weight of out_proj after a live merge."""
    ours = surgery.load(made(), folder, mha_out_proj_scale=scale)
    return surgery.eject(surgery.merge(ours), keep_merged=True).attn.out_proj.weight.detach()


def test_how_often_a_delta_of_out_proj_counts_can_be_said_and_is_told(tmp_path: Path) -> None:
    by_peft(tmp_path / "adapter")
    bare, eps = made().attn.out_proj.weight.detach(), torch.finfo(torch.float32).eps
    with pytest.warns(UserWarning, match=r"attn\.base_layer\.out_proj: its delta counts twice, as in PEFT up to 0\.21"):
        twice = merged_by(tmp_path / "adapter", None) - bare
    with pytest.warns(UserWarning, match=r"its delta counts once \(mha_out_proj_scale=1\)"):
        once = merged_by(tmp_path / "adapter", 1) - bare
    largest = float((bare.abs() + twice.abs()).max())  # three sums are rounded, one of them counted twice
    torch.testing.assert_close(twice, 2 * once, rtol=0.0, atol=2 * eps * largest)
    config = tmp_path / "adapter" / CONFIG
    config.write_text(config.read_text().replace('"peft_version": "0.21.2"', '"peft_version": "0.22.0"'))
    assert torch.equal(merged_by(tmp_path / "adapter", 1) - bare, once)


def test_an_adapter_of_ours_counts_once_and_peft_gives_its_outputs(tmp_path: Path) -> None:
    torch.manual_seed(1)
    ours = surgery.inject(made(), surgery.LoraConfig(**FIELDS))
    out_proj, p = ours.attn.out_proj, dict(ours.attn.out_proj.named_parameters())
    A, B = p["lora_A.default.weight"], p["lora_B.default.weight"]
    eps, before = torch.finfo(torch.float32).eps, out_proj.base_layer.weight
    torch.testing.assert_close(out_proj.weight, before + 8 / len(A) * (B @ A), rtol=0.0, atol=8 * eps)
    surgery.save(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(made(), tmp_path).eval()
    with slow_path():
        wanted = theirs(given()).detach()
    torch.testing.assert_close(ours(given()), wanted, **near(wanted, eps))
    again = surgery.load(made(), tmp_path, trainable=True)
    mine = ours.state_dict()
    assert all(torch.equal(values, mine[name]) for name, values in again.state_dict().items())


def test_a_merge_on_files_follows_what_is_said_and_verify_its_receipt(tmp_path: Path) -> None:
    by_peft(tmp_path / "adapter")
    base = saved(made(), tmp_path / "base")
    here = [base, tmp_path / "adapter", tmp_path / "out"]
    report = surgery.merge_checkpoint(*here, mha_out_proj_scale=1, reversible=True)
    assert any("its delta counts once" in note for note in report.receipt["notes"])
    assert report.receipt["adapters"][0]["mha_out_proj_scale"] == 1
    surgery.verify_checkpoint(*here).require()
    assert surgery.verify_checkpoint(*here).notes == ("mha_out_proj_scale 1 as the receipt tells",)
    other = surgery.verify_checkpoint(*here, mha_out_proj_scale=2)
    assert other.notes == ("mha_out_proj_scale 2 is given, and the receipt tells 1",)
    wrong = {name for name, one in other.tensors.items() if one.grade == "different"}
    assert wrong == {"attn.out_proj.weight", "layer.self_attn.out_proj.weight"}
    surgery.unmerge_checkpoint(tmp_path / "out", tmp_path / "back")
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()
    with pytest.raises(UsageError, match="PEFT counts the delta of out_proj twice"):
        surgery.merge_checkpoint(*here[:2], tmp_path / "c", mha_out_proj_scale=1, arithmetic="peft")


def test_an_out_proj_that_is_excluded_bears_nothing_and_peft_reads_what_is_saved_the_same(tmp_path: Path) -> None:
    fields = FIELDS | {"exclude_modules": ["out_proj"]}
    torch.manual_seed(1)
    ours = surgery.inject(made(), surgery.LoraConfig(**fields))
    assert not any("out_proj" in name for name, _ in ours.named_parameters() if "lora_" in name)
    surgery.save(ours, tmp_path)
    assert not any("out_proj" in name for name in load_file(tmp_path / TENSORS))
    wanted, eps = ours(given()).detach(), torch.finfo(torch.float32).eps
    assert torch.equal(surgery.load(made(), tmp_path, trainable=True)(given()), wanted)
    theirs = peft.PeftModel.from_pretrained(made(), tmp_path).eval()
    with slow_path():
        torch.testing.assert_close(theirs(given()), wanted, **near(wanted, eps))
    one = surgery.inject(made(), surgery.LoraConfig(**FIELDS | {"exclude_modules": ["self_attn.out_proj"]}))
    assert {name for name, _ in one.named_modules() if name.endswith("out_proj.lora_A")} == {
        "attn.base_layer.out_proj.lora_A"
    }
    followed = surgery.inject(made(), surgery.LoraConfig(**fields), matching="peft")
    wrapped = peft.get_peft_model(made(), peft.LoraConfig(**fields))
    found = (
        {name for name, _ in model.named_parameters() if "out_proj.lora_A" in name} for model in (followed, wrapped)
    )
    assert [len(names) for names in found] == [2, 2]


def test_dropout_that_no_input_meets_is_refused_at_load_too(tmp_path: Path) -> None:
    by_peft(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(config | {"lora_dropout": 0.1}))
    model = made()
    with pytest.raises(ConfigError, match=r"attn: lora_dropout is 0\.1"):
        surgery.load(model, tmp_path)
    assert not any(hasattr(module, "fitted") for module in model.modules())


def test_query_key_and_value_go_without_the_out_proj_of_the_same_layer() -> None:
    apart = nn.ModuleDict({"attn": nn.MultiheadAttention(16, 4, kdim=8, vdim=8)})
    fields = {"target_modules": ["out_proj"], "target_parameters": [f"attn.{one}_proj_weight" for one in "qkv"]}
    with pytest.raises(MatchError, match=r"attn: parameters of it are adapted, and so is attn\.out_proj"):
        surgery.inject(apart, surgery.LoraConfig(**fields))
    surgery.inject(apart, surgery.LoraConfig(**fields | {"target_modules": []}))
    with pytest.raises(MatchError, match=r"attn: parameters of it are adapted, and so is attn\.out_proj"):
        surgery.inject(apart, surgery.LoraConfig(target_modules=["out_proj"]), adapter_name="other")
