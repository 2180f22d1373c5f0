"""Writes the table of docs/quantization.md: each format decoded, merged, kept and undone, beside its library.

python -m bench.formats
"""

import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

import surgery
from surgery.codecs import FORMS
from surgery.codecs.mxfp4 import Mxfp4
from surgery.core.codec import Codec, Packed
from surgery.core.survival import Survival

PAGE = Path(__file__).parents[1] / "docs" / "quantization.md"
MARKS = "<!-- table: written by `python -m bench.formats` -->", "<!-- end of table -->"
SIZE, SITE = 1024, "model.layers.0.q_proj"
SHARES = (0.01, 0.03, 0.1)  # |delta| / |W|
CONFIGS = {
    "bnb4": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_compute_dtype": "bfloat16"},
    "bnb8": {"quant_method": "bitsandbytes", "load_in_8bit": True},
    "fp8_block": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "mxfp4": {"quant_method": "mxfp4"},
}
HEAD = (
    *("format", "decoded as by its library", "merged to 16 bit, verified", "undone"),
    *(f"kept, delta of {share:.0%}" for share in SHARES),
)


def main() -> None:
    lines = [HEAD, ["---"] * len(HEAD), *rows()]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    before, _, rest = PAGE.read_text().partition(MARKS[0])
    after = rest.partition(MARKS[1])[2]
    PAGE.write_text(f"{before}{MARKS[0]}\n{table}\n{MARKS[1]}{after}")
    print(table)


def rows() -> Iterator[list[str]]:
    for form, (codec, settings) in FORMS.items():
        packed = codec.fresh(weight(), settings)
        kept = [str(survived(codec, packed, share)) for share in SHARES]
        yield [form, compared(codec, packed), *merged(codec, packed), *kept]
    packed = Mxfp4().fresh(weight().view(1, SIZE, SIZE), {})
    yield ["mxfp4", compared(Mxfp4(), packed), *merged(Mxfp4(), packed), *["refused"] * len(SHARES)]


def weight() -> Tensor:
    return (torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()


def survived(codec: Codec, packed: Packed, share: float) -> Survival:
    """Of a delta of rank 16 and random directions."""
    drawn = torch.Generator().manual_seed(1)
    before = codec.decode(packed, torch.float64)
    delta = torch.randn(SIZE, 16, generator=drawn).double() @ torch.randn(16, SIZE, generator=drawn).double()
    wanted = before + delta * (share * before.norm() / delta.norm())
    return Survival.of(before, wanted, codec.decode(codec.encode(wanted, like=packed), torch.float64))


def compared(codec: Codec, packed: Packed) -> str:
    """The elements that differ from what the format's own library decodes, of all."""
    found, wanted = codec.decode(packed, torch.bfloat16), LIBRARIES[codec.name](packed)
    differ = int((found.view(torch.int16) != wanted.view(torch.int16)).sum())
    return f"{differ} of {found.numel():,} elements differ"


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


LIBRARIES: dict[str, Callable[[Packed], Tensor]] = {
    "bnb4": by_bitsandbytes4,
    "bnb8": by_bitsandbytes8,
    "fp8_block": by_transformers_fp8,
    "mxfp4": by_transformers_mxfp4,
}


def merged(codec: Codec, packed: Packed) -> list[str]:
    """What verify says of a reversible merge, and whether unmerge brings the very file back."""
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in ("base", "adapter"):
            (folder / part).mkdir()
        plain = {f"{SITE}.weight": weight()} if codec.name == "mxfp4" else {}  # its stack has no linear map beside it
        stem = "model.layers.0.mlp.experts.gate_up_proj" if plain else SITE
        held = {stem + codec.endings[role]: one for role, one in packed.tensors.items()}
        save_file(held | plain, folder / "base" / "model.safetensors", {"format": "pt"})
        config = {"model_type": "llama", "dtype": "bfloat16", "quantization_config": CONFIGS[codec.name]}
        (folder / "base" / "config.json").write_text(json.dumps(config))
        factors = {f"base_model.model.{SITE}.lora_{one}.weight": torch.randn(16, SIZE) / 100 for one in "AB"}
        factors[f"base_model.model.{SITE}.lora_B.weight"] = torch.randn(SIZE, 16) / 100
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
