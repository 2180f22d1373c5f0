"""Quantized checkpoints, made with the codecs alone: all linear weights of a small model in one format."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from checkpoint_folders import tensor_hashes, write_base
from torch import Tensor

from surgery.codecs import packed_of
from surgery.codecs.bnb4 import Bnb4
from surgery.codecs.bnb8 import Bnb8
from surgery.codecs.compressed_ints import IntQuantized, PackQuantized
from surgery.codecs.fp8_block import Fp8Block
from surgery.codecs.mxfp4 import Mxfp4
from surgery.core.codec import Codec, Packed

SITES = ("model.layers.0.q_proj", "model.layers.0.up_proj", "model.layers.1.q_proj", "model.layers.1.up_proj")
SHAPES = {"q_proj": (48, 70), "up_proj": (33, 48)}  # rows that are no multiple of a block
BITSANDBYTES = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_compute_dtype": "bfloat16"}
FP8 = {"quant_method": "fp8", "weight_block_size": [16, 16]}


def _compressed(form: str, **weights: object) -> dict[str, object]:
    """As compressed-tensors writes it."""
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "format": form}
    told = {"quant_method": "compressed-tensors", "format": form, "quantization_status": "compressed"}
    return told | {"config_groups": {"group_0": group}, "ignore": ["lm_head"], "kv_cache_scheme": None}


INT4 = {"num_bits": 4, "group_size": 2, "symmetric": True}  # of 70 and 48 inputs
UNEVEN = {"num_bits": 8, "group_size": -1, "symmetric": False}


def _rows(weight: Tensor) -> Packed:
    scale = weight.float().abs().amax(dim=1, keepdim=True) / 448
    return packed_of({"weight": (weight / scale).to(torch.float8_e4m3fn), "weight_scale": scale}, "rows")


FORMATS: Mapping[str, tuple[Codec, Callable[[Tensor], Packed], Mapping[str, object]]] = {
    "nf4": (Bnb4(), lambda w: Bnb4().fresh(w, {"quant_type": "nf4"}), BITSANDBYTES),
    "nf4-double": (Bnb4(), lambda w: Bnb4().fresh(w, {"quant_type": "nf4", "double_quant": True}), BITSANDBYTES),
    "fp4": (Bnb4(), lambda w: Bnb4().fresh(w, {"quant_type": "fp4", "blocksize": 32}), BITSANDBYTES),
    "int8": (Bnb8(), lambda w: Bnb8().fresh(w, {}), {"quant_method": "bitsandbytes", "load_in_8bit": True}),
    "fp8": (Fp8Block(), lambda w: Fp8Block().fresh(w, FP8), FP8),
    "fp8-rows": (Fp8Block(), _rows, {"quant_method": "fbgemm_fp8"}),
    "w4a16": (PackQuantized(), lambda w: PackQuantized().fresh(w, INT4), _compressed("pack-quantized", **INT4)),
    "w8a16": (PackQuantized(), lambda w: PackQuantized().fresh(w, UNEVEN), _compressed("pack-quantized", **UNEVEN)),
    "w8a8": (IntQuantized(), lambda w: IntQuantized().fresh(w, {}), _compressed("int-quantized", num_bits=8)),
}


def plain_weights(dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    drawn = torch.Generator().manual_seed(0)
    return {site: torch.randn(SHAPES[site.rpartition(".")[2]], generator=drawn).to(dtype) for site in SITES}


def quantized_base(folder: Path, form: str, shards: int = 1, **config: object) -> Path:
    """Quantized linear weights, and an embedding, a head and a norm in bfloat16."""
    codec, make, quantization = FORMATS[form]
    tensors = {"model.embed_tokens.weight": torch.arange(770.0).view(11, 70).bfloat16()}
    for site, weight in plain_weights().items():
        tensors |= {site + codec.endings[role]: one for role, one in make(weight).tensors.items()}
    tensors |= {"model.norm.weight": torch.ones(48).bfloat16(), "lm_head.weight": torch.ones(11, 70).bfloat16()}
    told = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}
    return write_base(folder, tensors, shards, told | {"quantization_config": dict(quantization)} | config)


def decoded(form: str, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """What the weights are, by name."""
    codec, make, _ = FORMATS[form]
    return {f"{site}.weight": codec.decode(make(weight), dtype) for site, weight in plain_weights().items()}


def experts_base(folder: Path) -> Path:
    """As gpt-oss: experts in mxfp4, the rest in bfloat16."""
    weight = torch.randn(3, 64, 10, generator=torch.Generator().manual_seed(0))
    packed = Mxfp4().fresh(weight, {})
    name = "model.layers.0.mlp.experts.gate_up_proj"
    tensors = {f"{name}_{role}": one for role, one in packed.tensors.items()}
    tensors |= {
        f"{name}_bias": torch.zeros(3, 10).bfloat16(),
        "model.layers.0.q_proj.weight": torch.randn(8, 6).bfloat16(),
    }
    config = {"model_type": "gpt_oss", "dtype": "bfloat16", "quantization_config": {"quant_method": "mxfp4"}}
    return write_base(folder, tensors, config=config)


def factors(sites: tuple[str, ...] = SITES[:3]) -> dict[str, Tensor]:
    """On the 22-bit grid as they are."""
    drawn, found = torch.Generator().manual_seed(1), {}
    for site in sites:
        out, in_features = SHAPES[site.rpartition(".")[2]]
        found[f"{site}.lora_A.weight"] = torch.randn(4, in_features, generator=drawn).half().float()
        found[f"{site}.lora_B.weight"] = torch.randn(out, 4, generator=drawn).half().float() / 64
    return found


def same_bytes(left: Tensor, right: Tensor) -> bool:
    return tensor_hashes({"": left}) == tensor_hashes({"": right})
