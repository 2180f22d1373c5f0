"""Pairs of the methods that place numbers in a weight: a Llama under peft and under surgery, and what both must do."""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import torch
from pairs import FILE, gradients, outputs, trained
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import surgery

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99}
SMALL |= {"initializer_range": 0.3, "attention_bias": True, "tie_word_embeddings": False}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TARGETS = ["q_proj", "down_proj"]


def made(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SMALL)).to(dtype).eval()
    with torch.no_grad():
        for name, values in model.named_parameters():
            if name.endswith("bias"):  # which are made as zeros
                values.normal_(std=0.1)
    return model


def by_peft(model: nn.Module, config: peft.PeftConfig, part: float) -> peft.PeftModel:
    return trained(peft.get_peft_model(copy.deepcopy(model), copy.deepcopy(config)), part)


def apart(found: Tensor, wanted: Tensor) -> float:
    return float((found.float() - wanted.float()).abs().max())


def near(found: Tensor, wanted: Tensor, dtype: torch.dtype) -> bool:
    """Within what two orders of the same roundings may lead apart: per layer some 8 of them, of sums of up to 48
    terms, two layers of 7 linears deep; each counts as an eps of the largest number."""
    return apart(found, wanted) <= 2 * 7 * 8 * torch.finfo(dtype).eps * float(wanted.abs().max())


def check_files(config: peft.PeftConfig, dtype: torch.dtype, part: float, folder: Path) -> None:
    """What peft saves gives its outputs here, is saved again in the same bytes, and gives them in peft."""
    model = made(dtype)
    theirs = by_peft(model, config, part)
    theirs.save_pretrained(folder / "theirs")
    ours = surgery.load(copy.deepcopy(model), folder / "theirs")
    wanted = outputs(theirs)
    assert near(outputs(ours), wanted, dtype)
    assert apart(outputs(model), wanted) > 4 * apart(outputs(ours), wanted)
    surgery.save(ours, folder / "ours")
    assert torch.equal(outputs(peft.PeftModel.from_pretrained(model, folder / "ours").eval()), wanted)
    found, saved = (load_file(folder / one / "adapter_model.safetensors") for one in ("ours", "theirs"))
    assert found.keys() == saved.keys()
    assert all(same_bytes(found[name], saved[name]) for name in saved)


def same_bytes(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def check_fresh(config: peft.PeftConfig) -> None:
    """A config of peft adapts the same modules, with tensors of the same names and shapes, zero where peft's are."""
    theirs, ours = peft.get_peft_model(made(), copy.deepcopy(config)), surgery.inject(made(), config)
    wanted = {n.removeprefix("base_model.model."): v for n, v in theirs.named_parameters() if v.requires_grad}
    found = {name: values for name, values in ours.named_parameters() if values.requires_grad}
    assert {n: v.shape for n, v in found.items()} == {n: v.shape for n, v in wanted.items()}
    for name, values in found.items():
        assert bool(values.any()) == bool(wanted[name].any())


def check_gradients(config: peft.PeftConfig, part: float, folder: Path) -> None:
    model = made()
    theirs = by_peft(model, config, part)
    theirs.save_pretrained(folder)
    found = []
    for one in (theirs, surgery.load(model, folder, trainable=True)):
        one(torch.arange(12)[None])[0].square().mean().backward()
        found.append(gradients(one))
    assert found[0].keys() == found[1].keys()
    assert all(near(values, found[0][name], torch.float32) for name, values in found[1].items())
    assert all(bool(values.any()) for values in found[0].values())


def check_fields(theirs: peft.PeftConfig, ours: surgery.AdapterConfig, folder: Path) -> None:
    """Every field that peft writes is read and written again."""
    theirs.save_pretrained(folder)
    written: Mapping[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    assert ours.to_json() == written
    assert type(ours).from_json(written) == ours


def check_streaming(config: peft.PeftConfig, dtype: torch.dtype, part: float, folder: Path) -> None:
    """A merge of files is the live one to the bit, graded so, and both come back to the bit."""
    model = made(dtype)
    model.save_pretrained(folder / "base")
    by_peft(model, config, part).save_pretrained(folder / "adapter")
    surgery.merge_checkpoint(folder / "base", folder / "adapter", folder / "out", reversible=True)
    report = surgery.verify_checkpoint(folder / "base", folder / "adapter", folder / "out")
    report.require()
    assert {one.grade for one in report.tensors.values()} == {"bits", "untouched"}
    read, fresh = (type(model).from_pretrained(folder / one, dtype=dtype).eval() for one in ("base", "out"))
    plain, live = outputs(read), surgery.load(read, folder / "adapter")
    before, adapted = {name: values.clone() for name, values in live.state_dict().items()}, outputs(live)
    surgery.merge(live)
    assert near(outputs(live), adapted, dtype)
    assert apart(plain, adapted) > 4 * apart(outputs(live), adapted)
    assert torch.equal(outputs(fresh), outputs(live))
    surgery.unmerge(live)
    assert all(torch.equal(values, before[name]) for name, values in live.state_dict().items())
    surgery.unmerge_checkpoint(folder / "out", folder / "back")
    assert (folder / "back" / FILE).read_bytes() == (folder / "base" / FILE).read_bytes()
