"""Writes the table of docs/quantization.md: what becomes of each format, measured, beside its own library.

python -m bench.formats
"""

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import surgery
from bench.words import put_between, table
from surgery.codecs import CODECS, FORMS
from surgery.codecs.fp8_block import Fp8Block
from surgery.core.codec import Codec, Packed
from surgery.core.feedback import Feedback
from surgery.core.survival import Survival

PAGE = Path(__file__).parents[1] / "docs" / "quantization.md"
MARKS = "<!-- table: written by `python -m bench.formats` -->", "<!-- end of table -->"
SIZE, SITE = 1024, "model.layers.0.q_proj"
SHARES = (0.01, 0.03, 0.1)  # |delta| / |W|
CALIBRATED, INPUTS, DIRECTIONS = 0.03, 64, 16  # of that share, by so many inputs, most of them along so few directions
HEAD = (
    *("format", "decoded as by its library", "merged to 16 bit, verified", "undone"),
    *(f"kept, delta of {share:.0%}" for share in SHARES),
    f"error of outputs over effect, delta of {CALIBRATED:.0%}: nearest, calibrated",
    *("live layers", "quantization-aware"),
)
CODEC = {codec.name: codec for codec in CODECS}


class Example(NamedTuple):
    """A format: its codec, the settings of a weight with fresh scales, and its config.json's quantization_config."""

    codec: Codec
    settings: Mapping[str, Any]
    config: Mapping[str, Any]

    def fresh(self, weight: Tensor) -> Packed:
        stacked = weight.unsqueeze(0) if self.codec.name == "mxfp4" else weight
        return self.codec.fresh(stacked, self.settings)


def of(form: str, config: Mapping[str, Any] | None = None) -> Example:
    """One of FORMS; `config` where it is not what a merge into it writes."""
    codec, settings = FORMS[form]
    return Example(codec, settings, config or codec.told(settings, torch.bfloat16, ()) or {})


BITSANDBYTES = {"quant_method": "bitsandbytes", "bnb_4bit_compute_dtype": "bfloat16"}
EXAMPLES: Mapping[str, Example] = {
    **{form: of(form, BITSANDBYTES) for form in ("nf4", "nf4-double", "fp4", "fp4-double", "int8")},
    "fp8_block": of("fp8_block"),
    "mxfp4": Example(CODEC["mxfp4"], {}, {"quant_method": "mxfp4"}),
    **{form: of(form) for form in ("w4a16", "w4a16-asym", "w8a16", "w8a8", "fp8_dynamic", "nvfp4", "mxfp4a16")},
    **{form: of(form) for form in ("torchao-int8", "torchao-fp8")},
}


def main() -> None:
    told = table(HEAD, rows())
    put_between(PAGE, MARKS, told)
    print(told)


def rows() -> Iterator[list[str]]:
    for name, example in EXAMPLES.items():
        drawn = weight()
        packed = example.fresh(drawn)
        left = [*(kept(example, packed, share) for share in SHARES), calibrated(example, packed)]
        yield [name, compared(example, packed), *merged(example, packed, drawn), *left, live(name), aware(name)]


def weight(size: int = SIZE) -> Tensor:
    return (torch.randn(size, size, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()


def kept(example: Example, packed: Packed, share: float) -> str:
    """What is left of a delta of rank 16 and random directions."""
    codec, (before, wanted) = example.codec, changed(example, packed, share)
    return str(Survival.of(before, wanted, codec.decode(codec.encode(wanted, like=packed), torch.float64)))


def changed(example: Example, packed: Packed, share: float) -> tuple[Tensor, Tensor]:
    """The weight as it is held, and as it is wanted."""
    drawn, before = torch.Generator().manual_seed(1), example.codec.decode(packed, torch.float64)
    size = before.shape[-1]
    delta = torch.randn(size, 16, generator=drawn).double() @ torch.randn(16, size, generator=drawn).double()
    return before, before + delta * (share * before.norm() / delta.norm())


def calibrated(example: Example, packed: Packed) -> str:
    """The error of outputs over the effect of the delta, for inputs such as the calibration has."""
    codec, (before, wanted) = example.codec, changed(example, packed, CALIBRATED)
    if before.dim() > 2:
        return "not for experts"
    drawn = torch.Generator().manual_seed(2)
    few = torch.randn(2 * INPUTS, DIRECTIONS, generator=drawn) @ torch.randn(
        DIRECTIONS, before.shape[1], generator=drawn
    )
    seen, others = (few + torch.randn(few.shape, generator=drawn)).double().split(INPUTS)
    near = codec.encode(wanted, like=packed)
    fed = Feedback.of_inputs(seen).choose(wanted, codec.decode(near, torch.float64), *codec.grid(near))
    effect = ((wanted - before) @ others.T).norm()
    errors = (((one - wanted) @ others.T).norm() / effect for one in (codec.decode(near, torch.float64), fed))
    return ", ".join(f"{float(one):.3g}" for one in errors)


def compared(example: Example, packed: Packed) -> str:
    """The elements that differ from what the format's own library decodes, of all."""
    compressor = example.config.get("format")
    found = example.codec.decode(packed, torch.bfloat16)
    wanted = by_compressed_tensors(example, packed) if compressor else LIBRARIES[example.codec.name](packed)
    differ = int((found.view(torch.int16) != wanted.view(torch.int16)).sum())
    return f"{differ} of {found.numel():,} elements differ"


def live(name: str) -> str:
    """Whether adapters run over the layers that hold a weight so: "yes" if one does here, by what they compute."""
    made = LAYERS.get(name)
    if made is None:
        return "no"
    net = nn.Sequential(made())
    surgery.inject(net, surgery.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    wanted = nn.functional.linear(x, net[0].weight.to(torch.bfloat16))
    return "yes" if torch.allclose(net(x).float(), wanted.float(), rtol=0.1, atol=0.1) else "no"


def aware(name: str) -> str:
    """Whether an adapter is trained as its merge will be held so: "yes" where it runs that weight, to the bit."""
    if name not in FORMS:
        return refused(name)
    codec, told = FORMS[name]
    nets = [nn.Sequential(nn.Linear(128, 128)) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    for net, form in zip(nets, (name, None), strict=True):
        torch.manual_seed(1)
        config = surgery.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
        surgery.inject(net, config, quantization_aware=form)
    merged = surgery.eject(surgery.merge(nets[1]), keep_merged=True)[0].weight.detach()
    held = codec.decode(codec.fresh(merged, told), merged.dtype)
    return "yes" if torch.equal(nets[0][0].weight.detach(), held) else "no"


def refused(name: str) -> str:
    """Why an adapter cannot be aware of the format; nothing where it can."""
    config = surgery.LoraConfig(r=2, target_modules=["0"])
    try:
        surgery.inject(nn.Sequential(nn.Linear(128, 128)), config, quantization_aware=name)
    except surgery.UsageError as error:
        return f"refused: {str(error).partition(repr(name) + ': ')[2]}"
    return ""


def of_bitsandbytes(kind: str, double_quant: bool = False) -> nn.Module:
    layer = nn.Sequential(nn.Linear(128, 128, bias=False, dtype=torch.bfloat16))
    return surgery.quantize(layer, kind, double_quant=double_quant)[0]


def of_transformers() -> nn.Module:
    from transformers.integrations.finegrained_fp8 import FP8Linear

    layer, packed = FP8Linear(128, 128, (128, 128)), Fp8Block().fresh(torch.randn(128, 128), {})
    for role, values in packed.tensors.items():
        setattr(layer, role, nn.Parameter(values, requires_grad=False))
    return layer


LAYERS: Mapping[str, Callable[[], nn.Module]] = {
    **{kind: lambda kind=kind: of_bitsandbytes(kind) for kind in ("nf4", "fp4", "int8")},
    **{f"{kind}-double": lambda kind=kind: of_bitsandbytes(kind, True) for kind in ("nf4", "fp4")},
    "fp8_block": of_transformers,
}


def by_bitsandbytes4(packed: Packed) -> Tensor:
    from bitsandbytes.functional import QuantState, dequantize_4bit

    held = {role.removeprefix("weight."): one for role, one in packed.tensors.items() if role != "weight"}
    return dequantize_4bit(packed.tensors["weight"], QuantState.from_dict(held, torch.device("cpu")))


def by_bitsandbytes8(packed: Packed) -> Tensor:
    from bitsandbytes.functional import int8_vectorwise_dequant

    return int8_vectorwise_dequant(packed.tensors["weight"], packed.tensors["SCB"]).bfloat16()


def by_transformers_fp8(packed: Packed) -> Tensor:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    held = packed.tensors
    return Fp8Dequantize(None)._dequantize_one(held["weight"], held["weight_scale_inv"], torch.bfloat16)


def by_transformers_mxfp4(packed: Packed) -> Tensor:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    return convert_moe_packed_tensors(packed.tensors["blocks"], packed.tensors["scales"], dtype=torch.bfloat16)


def by_torchao_int8(packed: Packed) -> Tensor:
    from torchao.quantization.quant_primitives import dequantize_affine

    qdata, scale, zero_point = (packed.tensors[role] for role in ("qdata", "scale", "zero_point"))
    return dequantize_affine(qdata, [1, qdata.shape[1]], scale, zero_point, torch.int8, output_dtype=torch.bfloat16)


def by_torchao_fp8(packed: Packed) -> Tensor:
    from torchao.quantization.quant_primitives import _dequantize_affine_float8

    return _dequantize_affine_float8(packed.tensors["qdata"], packed.tensors["scale"], torch.bfloat16)


def by_compressed_tensors(example: Example, packed: Packed) -> Tensor:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    group = example.config["config_groups"]["group_0"]
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**group["weights"]))
    compressor = BaseCompressor.get_value_from_registry(example.config["format"])
    return compressor.decompress(dict(packed.tensors), scheme)["weight"].bfloat16()


LIBRARIES: Mapping[str, Callable[[Packed], Tensor]] = {
    "bnb4": by_bitsandbytes4,
    "bnb8": by_bitsandbytes8,
    "fp8_block": by_transformers_fp8,
    "mxfp4": by_transformers_mxfp4,
    "torchao-int8": by_torchao_int8,
    "torchao-fp8": by_torchao_fp8,
}


def merged(example: Example, packed: Packed, weight: Tensor) -> list[str]:
    """What verify says of a reversible merge, and whether unmerge brings the very file back."""
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in ("base", "adapter"):
            (folder / part).mkdir()
        plain = (
            {f"{SITE}.weight": weight} if example.codec.name == "mxfp4" else {}
        )  # its stack has no linear map beside it
        stem = "model.layers.0.mlp.experts.gate_up_proj" if plain else SITE
        held = {stem + example.codec.endings[role]: one for role, one in packed.tensors.items()}
        save_file(held | plain, folder / "base" / "model.safetensors", {"format": "pt"})
        config = {"model_type": "llama", "dtype": "bfloat16", "quantization_config": dict(example.config)}
        (folder / "base" / "config.json").write_text(json.dumps(config))
        factors = {f"base_model.model.{SITE}.lora_{one}.weight": torch.randn(16, len(weight)) / 100 for one in "AB"}
        factors[f"base_model.model.{SITE}.lora_B.weight"] = torch.randn(len(weight), 16) / 100
        save_file(factors, folder / "adapter" / "adapter_model.safetensors")
        told = {"peft_type": "LORA", "r": 16, "lora_alpha": 16, "target_modules": ["q_proj"]}
        (folder / "adapter" / "adapter_config.json").write_text(json.dumps(told))
        surgery.merge_checkpoint(folder / "base", folder / "adapter", folder / "out", reversible=True)
        grades = surgery.verify_checkpoint(folder / "base", folder / "adapter", folder / "out")
        surgery.unmerge_checkpoint(folder / "out", folder / "back")
        same = all((folder / one).read_bytes() == (folder / f"back/{Path(one).name}").read_bytes() for one in FILES)
        return [grades.summary(), "to the byte" if same else "no"]


FILES = ("base/model.safetensors", "base/config.json")


if __name__ == "__main__":
    main()
