"""LoRA whose B has a bias, through every procedure and beside peft."""

import copy
from pathlib import Path

import peft
import pytest
import torch
from checkpoint_folders import file_hashes, read_tensors, tensor_hashes, write_base
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import surgery
from surgery import ConfigError, LoraConfig, MatchError, ValueRangeError

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FIELDS = {"r": 2, "lora_alpha": 3, "lora_bias": True, "target_modules": ["0", "2"], "init_lora_weights": False}
CHANGED = {"0.weight", "0.bias", "2.weight", "2.bias"}
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), Conv1D(8, 10))
    nn.init.normal_(made[2].bias)
    return made.to(dtype)


@pytest.fixture
def x() -> Tensor:
    return torch.linspace(-1, 1, 24).view(4, 6)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    torch.manual_seed(1)
    surgery.save(surgery.inject(net(), LoraConfig(**FIELDS)), tmp_path / "adapter")
    (tmp_path / "adapter" / "surgery.base.json").unlink()  # the tests lay it over the same base in other dtypes
    return tmp_path / "adapter"


@each_dtype
def test_peft_reads_it_with_equal_outputs_and_writes_the_same_tensors(
    dtype: torch.dtype, adapter: Path, x: Tensor, tmp_path: Path
) -> None:
    ours, before = surgery.load(net(dtype), adapter)(x.to(dtype)), net(dtype)(x.to(dtype))
    theirs = peft.PeftModel.from_pretrained(net(dtype), adapter).eval()
    # Two layers of at most 10 terms, each sum rounded once; there bias and product are added in another order.
    room = 2 * (10 + 4) * torch.finfo(dtype).eps * float(ours.abs().max())
    assert float((ours - theirs(x.to(dtype))).abs().max()) <= room
    assert float((ours - before).abs().max()) > room
    theirs.save_pretrained(tmp_path / "theirs")
    found, wanted = (load_file(tmp_path / one / "adapter_model.safetensors") for one in ("adapter", "theirs"))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert torch.equal(surgery.load(net(dtype), tmp_path / "theirs")(x.to(dtype)), ours)


@each_dtype
def test_merges_live_and_streaming_change_the_bias_too_and_come_back(
    dtype: torch.dtype, adapter: Path, x: Tensor, tmp_path: Path
) -> None:
    base = write_base(tmp_path / "base", net(dtype).state_dict())
    model = surgery.load(net(dtype), adapter)
    before, out, bias = tensor_hashes(model.state_dict()), model(x.to(dtype)).detach(), model[0].bias.detach()
    surgery.merge(model)
    room = 2 * (10 + 6) * torch.finfo(dtype).eps * max(4.0, float(out.abs().max()))
    assert float((model(x.to(dtype)).detach() - out).abs().max()) <= room
    assert float((model[0].bias - bias).abs().max()) <= torch.finfo(dtype).eps * float(bias.abs().max())
    after = tensor_hashes(model.state_dict())
    assert {name.replace("base_layer.", "") for name in before if after[name] != before[name]} == CHANGED
    surgery.merge_checkpoint(base, adapter, tmp_path / "out", reversible=True)
    surgery.unmerge(model)
    assert tensor_hashes(model.state_dict()) == before
    surgery.eject(surgery.merge(model), keep_merged=True)
    assert tensor_hashes(read_tensors(tmp_path / "out")) == tensor_hashes(model.state_dict())
    assert surgery.verify_checkpoint(base, adapter, tmp_path / "out").counts["bits"] == 4
    surgery.unmerge_checkpoint(tmp_path / "out", tmp_path / "back")
    assert file_hashes(tmp_path / "back") == file_hashes(base)


@each_dtype
@pytest.mark.parametrize("safe", [False, True])
def test_a_merge_by_peft_passes_verify_and_one_without_the_bias_does_not(
    dtype: torch.dtype, safe: bool, adapter: Path, tmp_path: Path
) -> None:
    base = write_base(tmp_path / "base", net(dtype).state_dict())
    merged = peft.PeftModel.from_pretrained(net(dtype), adapter).merge_and_unload(safe_merge=safe).state_dict()
    out = write_base(tmp_path / "out", merged)
    surgery.verify_checkpoint(base, adapter, out).require()
    out = write_base(tmp_path / "wrong", merged | {"0.bias": net(dtype)[0].bias.detach()})
    report = surgery.verify_checkpoint(base, adapter, out)
    assert [name for name, one in report.tensors.items() if one.grade == "different"] == ["0.bias"]


def test_gradients_are_those_of_peft(adapter: Path, x: Tensor) -> None:
    ours = surgery.load(net(), adapter, trainable=True)
    theirs = peft.PeftModel.from_pretrained(net(), adapter, is_trainable=True).eval()
    for model in (ours, theirs):
        model(x).square().sum().backward()
    wanted = {name.removeprefix("base_model.model."): v.grad for name, v in theirs.named_parameters()}
    found = {name: values.grad for name, values in ours.named_parameters() if values.grad is not None}
    assert {name for name in wanted if wanted[name] is not None} == found.keys()
    for name, grad in found.items():
        room = 4 * 2 * (10 + 4) * torch.finfo(torch.float32).eps * float(wanted[name].abs().max())
        assert float((grad - wanted[name]).abs().max()) <= room


def test_dora_over_it_leaves_the_bias_as_it_is_then(adapter: Path, x: Tensor, tmp_path: Path) -> None:
    dora = surgery.inject(net(), LoraConfig(r=2, use_dora=True, target_modules=["0", "2"], init_lora_weights=False))
    surgery.save(dora, tmp_path / "dora")
    model = surgery.load(surgery.load(net(), adapter), tmp_path / "dora", adapter_name="dora")
    with torch.no_grad():
        model[0].fitted["dora"].params["m"].mul_(1.5)
    surgery.set_adapter(model, ["default", "dora"])
    out = model(x).detach()
    surgery.merge(model)
    assert float((model(x).detach() - out).abs().max()) <= 40 * torch.finfo(torch.float32).eps * float(out.abs().max())


def test_an_embedding_is_refused_and_nothing_changes() -> None:
    layer = nn.Embedding(6, 6)
    model = nn.Sequential(layer)
    with pytest.raises(MatchError, match=r"0: .*lora_bias"):
        surgery.inject(model, LoraConfig(lora_bias=True, target_modules=["0"]))
    assert model[0] is layer


def without_biases(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 10, bias=False), nn.Tanh(), nn.Linear(10, 8, bias=False)).to(dtype)


@each_dtype
def test_layers_without_a_bias_are_given_one_as_in_peft_and_merged_by_neither(
    dtype: torch.dtype, x: Tensor, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    theirs = peft.get_peft_model(without_biases(dtype), peft.LoraConfig(**FIELDS)).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours, wanted = surgery.load(without_biases(dtype), tmp_path / "theirs", trainable=True), theirs(x.to(dtype))
    room = 2 * (10 + 4) * torch.finfo(dtype).eps * float(wanted.detach().abs().max())
    assert float((ours(x.to(dtype)) - wanted).detach().abs().max()) <= room
    ours(x.to(dtype)).sum().backward()
    assert all(bool(one.grad.any()) for name, one in ours.named_parameters() if name.endswith("lora_B.default.bias"))
    surgery.save(ours, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(without_biases(dtype), tmp_path / "ours").eval()
    assert torch.equal(again(x.to(dtype)), wanted)
    before, base = tensor_hashes(ours.state_dict()), without_biases(dtype).state_dict()
    said = r"0: it has no bias, and this adapter adds one \(lora_bias\)"
    with pytest.raises(MatchError, match=said):
        surgery.merge(ours)
    assert tensor_hashes(ours.state_dict()) == before
    with pytest.raises(MatchError, match=said):
        surgery.merge_checkpoint(write_base(tmp_path / "base", base), tmp_path / "ours", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(RuntimeError, match="no bias"):
        theirs.merge_and_unload()


def test_dora_over_a_bias_that_only_an_adapter_brings_leaves_it_as_it_is() -> None:
    model = surgery.inject(without_biases()[:1], LoraConfig(**FIELDS | {"target_modules": ["0"]}))
    surgery.inject(model, LoraConfig(r=2, use_dora=True, target_modules=["0"]), adapter_name="dora")
    surgery.set_adapter(model, ["default", "dora"])
    with torch.no_grad():
        model[0].fitted["dora"].params["m"].mul_(2)  # which scales what comes of the inputs, here of none
        found, wanted = model(torch.zeros(1, 6))[0], 1.5 * model[0].lora_B.default.bias
    torch.testing.assert_close(found, wanted, rtol=0.0, atol=4 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("other", [{"use_dora": True}, {"init_lora_weights": "gaussian"}], ids=str)
def test_what_peft_refuses_with_it_is_refused(other: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="lora_bias"):
        peft.LoraConfig(lora_bias=True, **other)
    with pytest.raises(ConfigError, match="lora_bias"):
        LoraConfig(lora_bias=True, **other)


def test_a_bias_that_is_no_number_is_refused_and_nothing_changes() -> None:
    model = surgery.inject(net(), LoraConfig(**FIELDS))
    with torch.no_grad():
        model[2].fitted["default"].params["b"][1] = torch.nan
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueRangeError, match=r"2\.bias: b holds NaN"):
        surgery.merge(model)
    assert tensor_hashes(model.state_dict()) == tensor_hashes(before)


def test_adapters_with_and_without_it_come_and_go(x: Tensor) -> None:
    model = surgery.inject(net(), LoraConfig(**FIELDS))
    surgery.inject(model, LoraConfig(**FIELDS | {"lora_bias": False}), adapter_name="plain")
    names = {name for name in model.state_dict() if name.startswith("0.lora_B")}
    assert names == {"0.lora_B.default.weight", "0.lora_B.default.bias", "0.lora_B.plain.weight"}
    assert torch.equal(surgery.eject(model)(x), net()(x))
