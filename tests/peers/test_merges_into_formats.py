"""Merges into a format, as transformers and bitsandbytes load them: every linear layer but the head."""

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from test_quantized_bases_of_transformers import FILE, SMALL, loaded, near, outputs, trained
from torch import nn
from transformers import BartConfig, LlamaConfig, LlamaForCausalLM
from transformers.models.bart.modeling_bart import BartEncoder

import surgery
from surgery.codecs import CODECS
from surgery.hosts.checkpoint import Checkpoint
from surgery.procedures.planning.treatment import HELD_IN

ANY = {"min_retained": 0.0, "max_noise": 99.0}
FOURBIT = ("nf4", "nf4-double", "fp4", "fp4-double")
HELD = {**dict.fromkeys(FOURBIT, "Linear4bit"), "int8": "Linear8bitLt"}  # fp8 is decoded on a CPU


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, an adapter of two of its kinds of layers, and their merge in 16 bits."""
    folder = tmp_path_factory.mktemp("into")
    base, sizes = folder / "base", {"hidden_size": 128, "intermediate_size": 256}  # whole groups of any form
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SMALL | sizes)).bfloat16().save_pretrained(base)
    trained(loaded(base, torch.bfloat16), ["q_proj", "down_proj"]).save_pretrained(folder / "adapter")
    surgery.merge_checkpoint(base, folder / "adapter", folder / "16bit")
    for form in HELD_IN:
        surgery.merge_checkpoint(base, folder / "adapter", folder / form, into=form, **ANY)
    return folder


@pytest.mark.parametrize("form", HELD_IN)
def test_transformers_loads_every_linear_layer_in_the_format_and_computes_with_what_it_decodes_to(form, merged: Path):
    model = loaded(merged / form, torch.bfloat16)
    assert {type(one).__name__ for name, one in model.named_modules() if name.endswith("_proj")} == {
        HELD.get(form, "Linear")
    }
    assert type(model.lm_head) is nn.Linear
    plain = loaded(merged / "16bit", torch.bfloat16)
    with Checkpoint(merged / form) as files:
        assert len(files.packed) == 14
        for site in files.sites():
            if site.name.endswith("_proj"):
                packed = files.load(site)
                codec = next(one for one in CODECS if one.claims(packed.headers))
                plain.get_submodule(site.name).weight.data = codec.decode(packed, torch.bfloat16)
    wanted = outputs(plain)
    if form == "int8":  # which rounds its inputs to 127 steps each way, in each of 14 layers
        assert float((outputs(model) - wanted).norm() / wanted.norm()) < 14 / 127
    else:
        assert near(outputs(model), wanted, torch.bfloat16)


@pytest.mark.parametrize("form", ["nf4", "fp4", "int8"])
def test_it_is_what_quantize_makes_of_the_merged_model_to_the_byte(form, merged: Path, tmp_path: Path):
    surgery.quantize(loaded(merged / "16bit", torch.bfloat16), form).save_pretrained(tmp_path / "saved")
    wanted, found = load_file(tmp_path / "saved" / FILE), load_file(merged / form / FILE)
    assert found.keys() == wanted.keys()
    assert all(found[name].dtype == one.dtype and torch.equal(found[name], one) for name, one in wanted.items())
    ours, theirs = (
        json.loads((one / "config.json").read_text())["quantization_config"]
        for one in (merged / form, tmp_path / "saved")
    )
    assert ours.items() <= theirs.items()


@pytest.mark.parametrize("form", HELD_IN)
def test_verify_grades_all_of_it_bits(form, merged: Path):
    report = surgery.verify_checkpoint(merged / "base", merged / "adapter", merged / form)
    assert report.counts == {"bits": 14, "rounding": 0, "untouched": 7, "recorded": 0, "different": 0}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The encoder of BART alone, whose class transformers has and does not export, with an adapter."""
    folder = tmp_path_factory.mktemp("encoder")
    sizes = {"d_model": 64, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 64, "vocab_size": 29}
    torch.manual_seed(0)
    BartEncoder(BartConfig(**sizes)).bfloat16().save_pretrained(folder / "base")
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    peft.get_peft_model(BartEncoder.from_pretrained(folder / "base"), config).save_pretrained(folder / "adapter")
    return folder


@pytest.mark.parametrize("form", ["nf4", "int8"])
def test_a_part_of_a_model_goes_into_a_format_whole(form, encoder: Path, tmp_path: Path):
    """Each of its linear layers, as those of a model whose class is exported."""
    surgery.merge_checkpoint(encoder / "base", encoder / "adapter", tmp_path / "out", into=form, **ANY)
    with Checkpoint(tmp_path / "out") as files:
        linear = [
            name
            for name, one in BartEncoder.from_pretrained(encoder / "base").named_modules()
            if type(one) is nn.Linear
        ]
        assert len(linear) == 12
        assert {*files.packed} == {f"{name}.weight" for name in linear}
    report = surgery.verify_checkpoint(encoder / "base", encoder / "adapter", tmp_path / "out")
    assert report.counts["bits"] == 12
    model = BartEncoder.from_pretrained(tmp_path / "out")
    assert {type(one).__name__ for name, one in model.named_modules() if name in linear} == {HELD[form]}


@pytest.mark.parametrize("architectures", [["NoSuchModel"], ["BartConfig"], ["a.b"]], ids=str)
def test_a_class_that_transformers_has_not_is_refused_with_what_to_do_there(architectures, encoder: Path, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(encoder / "base", base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"architectures": architectures}))
    with pytest.raises(surgery.InputError, match="let its config name a class of it, or leave into out"):
        surgery.merge_checkpoint(base, encoder / "adapter", tmp_path / "out", into="nf4", **ANY)
    surgery.merge_checkpoint(base, encoder / "adapter", tmp_path / "out")


@pytest.mark.parametrize("base", ["base", "nf4"])
def test_transformers_loads_what_fell_back_to_16_bits_beside_4_bit_layers(base, merged: Path, tmp_path: Path):
    """Those whose noise is above the middle one, of a plain base that goes into nf4, and of one that keeps it."""
    into, out = ("nf4" if base == "base" else "keep"), tmp_path / "out"
    adapter = merged / "adapter"
    receipt = surgery.merge_checkpoint(merged / base, adapter, tmp_path / "all", into=into, **ANY).receipt
    noise = sorted(one["noise"] for one in receipt["changed"].values() if "noise" in one)
    bounds = {"min_retained": 0.0, "max_noise": sum(noise[1:3]) / 2}
    fallen = surgery.merge_checkpoint(merged / base, adapter, out, into=into, fallback="16bit", **bounds).receipt
    assert len(fallen["fallback"]) == 2
    model = loaded(out, torch.bfloat16)
    kinds = {f"{name}.weight": type(one) for name, one in model.named_modules() if name.endswith(("_proj", "lm_head"))}
    assert {name for name, kind in kinds.items() if kind is nn.Linear} == {*fallen["fallback"], "lm_head.weight"}
    surgery.merge_checkpoint(merged / base, adapter, tmp_path / "16bit")
    wanted, found = load_file(tmp_path / "16bit" / FILE), dict(model.named_parameters())
    assert all(torch.equal(found[name], wanted[name]) for name in fallen["fallback"])
    assert surgery.verify_checkpoint(merged / base, adapter, out).ok
