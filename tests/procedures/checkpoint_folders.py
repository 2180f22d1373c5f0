"""Tiny bases and adapters as folders, and the sha256 of what lies in one."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from surgery import LoraConfig

SHAPES = {
    "model.embed_tokens": (11, 6),
    "model.layers.0.q_proj": (6, 6),
    "model.layers.0.up_proj": (10, 6),
    "model.layers.1.q_proj": (6, 6),
    "model.layers.1.up_proj": (10, 6),
    "lm_head": (11, 6),
}
SITES = ("model.layers.0.q_proj", "model.layers.0.up_proj", "model.layers.1.q_proj", "model.layers.1.up_proj")
SPECIAL = (0.0, -0.0, 1.0, -2.0, 0.5, 2.0**-10, -(2.0**-14), 4.0)
INDEX = "model.safetensors.index.json"


def base_tensors(dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    """Weights with zeros of both signs and powers of two; a vector, a scalar and integers beside them."""
    torch.manual_seed(seed)
    found = {}
    for name, shape in SHAPES.items():
        weight = torch.randn(shape)
        weight.view(-1)[: len(SPECIAL)] = torch.tensor(SPECIAL)
        found[f"{name}.weight"] = weight.to(dtype)
    found["model.norm.weight"] = torch.randn(6).to(dtype)
    found["model.scale"] = torch.tensor(0.3).to(dtype)
    found["model.positions"] = torch.arange(5)
    return found


def write_base(folder: Path, tensors: Mapping[str, Tensor], shards: int = 1, config: Mapping | None = None) -> Path:
    """A checkpoint in one file, or in shards with their index; with config.json if given."""
    folder.mkdir(parents=True)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config, indent=2))
    if shards == 1:
        save_file(dict(tensors), folder / "model.safetensors", {"format": "pt"})
        return folder
    names, weight_map = list(tensors), {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        here = names[shard::shards]
        save_file({name: tensors[name] for name in here}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(here, file)
    size = sum(values.nbytes for values in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2))
    return folder


def llama_base(folder: Path) -> Path:
    """One file in bfloat16 that a config says is of a Llama."""
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}
    return write_base(folder, base_tensors(torch.bfloat16), config=config)


def factors(sites: tuple[str, ...] = SITES, r: int = 4, seed: int = 1) -> dict[str, Tensor]:
    """Random A and B for linear sites, by their names in the base."""
    torch.manual_seed(seed)
    found = {}
    for site in sites:
        out_features, in_features = SHAPES[site]
        found[f"{site}.lora_A.weight"] = torch.randn(r, in_features) / 4
        found[f"{site}.lora_B.weight"] = torch.randn(out_features, r) / 4
    return found


def write_adapter(folder: Path, tensors: Mapping[str, Tensor] | None = None, **fields: object) -> Path:
    """An adapter folder as PEFT writes it."""
    folder.mkdir(parents=True)
    given = factors() if tensors is None else tensors
    config = LoraConfig(**({"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "up_proj"]} | fields))
    (folder / "adapter_config.json").write_text(json.dumps(config.to_json()))
    save_file({f"base_model.model.{name}": values for name, values in given.items()}, _weights(folder))
    return folder


def rewrite(path: Path, changed: Mapping[str, Tensor | None]) -> None:
    """The tensors of a file anew, some of them replaced, added, or left out where None."""
    tensors = load_file(path) | dict(changed)
    save_file({name: values for name, values in tensors.items() if values is not None}, path, {"format": "pt"})


def flip_byte(path: Path, at: int = -1) -> None:
    """The same file with one byte changed."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def file_hashes(folder: Path) -> dict[str, str]:
    """sha256 of every file below a folder, by its path there."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): _sha256(path.read_bytes()) for path in files}


def tensor_hashes(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """sha256 of each tensor's bytes, its dtype and its shape before them."""
    found = {}
    for name, values in tensors.items():
        octets = values.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        found[name] = _sha256(f"{values.dtype} {tuple(values.shape)} ".encode() + octets)
    return found


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, read by the safetensors library."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def _weights(folder: Path) -> Path:
    return folder / "adapter_model.safetensors"


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
