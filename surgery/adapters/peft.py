"""PEFT's adapter folder: adapter_config.json and adapter_model.safetensors."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from surgery.core.adapter import Adapter
from surgery.core.config import AdapterConfig
from surgery.core.names import suffix_hits, suffixes
from surgery.core.site import TensorInfo
from surgery.errors import AbsentError, ConfigError, FormatError, ShapeError, printable
from surgery.io.fingerprint import read_base_print
from surgery.io.header import SPELLINGS, encode_header
from surgery.io.octets import octets, tensor_from
from surgery.io.regular import contained
from surgery.io.strict_json import parse_json, read_bytes
from surgery.io.tensor_file import TensorFile
from surgery.methods import METHODS

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
PREFIX = "base_model.model."
_EMBEDDINGS = frozenset({"embed_tokens", "lm_head", "wte", "word_embeddings", "embed_in", "embed_out", "shared"})


class Found(NamedTuple):
    """A tensor of an adapter file."""

    key: str
    values: Tensor


def read_adapter(path: Path, config_name: str = CONFIG) -> Adapter:
    """The adapter in a folder, or in one file beside its config. Every tensor has its place, or InputError."""
    folder, file = (path, contained(path, TENSORS)) if path.is_dir() else (path.parent, path)
    if config_name == CONFIG:
        _refuse_pickles(folder, file)
    told = read_bytes(contained(folder, config_name), "an adapter's config")
    where = printable(folder / config_name)
    config = config_from(parse_json(told, where), where)
    tensors, sha256 = _read_tensors(file)
    sha256[config_name] = hashlib.sha256(told).hexdigest()
    found = _sorted_out(config, tensors, str(path), sha256)
    return replace(found, files=(config_name, file.name), trained_on=read_base_print(folder))


def config_from(data: Mapping[str, Any], where: str) -> AdapterConfig:
    """The config that `data` spells; FormatError for a `peft_type` that is none of ours."""
    kind = data.get("peft_type")
    if not isinstance(kind, str) or kind not in METHODS:
        known = ", ".join(METHODS)
        raise FormatError(f"{where}: peft_type is {printable(kind)!r}; supported are {known}; use PEFT for this one")
    return METHODS[kind].from_json(data, where)


def adapter_of(config: AdapterConfig, tensors: Mapping[str, Tensor], where: str) -> Adapter:
    """The adapter that tensors in memory are, each named as in a file. Every one has its place, or FormatError."""
    return _sorted_out(config, [Found(*one) for one in tensors.items()], where, {})


def adapter_bytes(tensors: Mapping[str, Tensor], prefix: str = PREFIX) -> bytes:
    """The content of adapter_model.safetensors, for tensors by their name in the base as PEFT ends it."""
    found = [(prefix + name, tensors[name].detach().cpu().contiguous()) for name in sorted(tensors)]
    infos = [TensorInfo(key, values.dtype, tuple(values.shape)) for key, values in found]
    return b"".join([encode_header(infos, {"format": "pt"}), *(octets(values) for _, values in found)])


def _refuse_pickles(folder: Path, file: Path) -> None:
    pickled = file if file.suffix in (".bin", ".pt", ".pth") else folder / "adapter_model.bin"
    if pickled.exists() and (pickled == file or not file.exists()):
        raise FormatError(
            f"{printable(pickled)}: a pickle, which can run code when it is read; {TENSORS} is wanted; "
            "load it in PEFT and save it again"
        )
    if not file.exists():
        inside = sorted(path.parent.name for path in folder.glob(f"*/{TENSORS}"))
        hint = f"name one of its sub-folders: {printable(', '.join(inside))}" if inside else "check the path"
        raise AbsentError(f"{printable(folder)}: it holds no {TENSORS}; an adapter folder is wanted; {hint}")


def _read_tensors(path: Path) -> tuple[list[Found], dict[str, str]]:
    file = TensorFile(path)
    try:
        found, sha256, whole = [], {}, hashlib.sha256(file.header.raw)
        for info, start in file.header.entries:
            data = file.read(start, info.nbytes)
            whole.update(data)
            sha256[info.name] = hashlib.sha256(data).hexdigest()
            try:
                found.append(Found(info.name, tensor_from(data, info.torch_dtype, info.shape)))
            except FormatError as error:
                raise FormatError(f"{file.where}: {error}") from error
        file.check_unchanged()
        return found, sha256 | {path.name: whole.hexdigest()}
    finally:
        file.close()


def _sorted_out(config: AdapterConfig, tensors: list[Found], where: str, sha256: Mapping[str, str]) -> Adapter:
    sites: dict[str, dict[str, Tensor]] = {}
    saved: dict[str, Tensor] = {}
    copies: dict[str, Tensor] = {}
    ops = {}
    entries = frozenset(config.modules_to_save or ())
    for key, values in tensors:
        name = key.removeprefix(PREFIX)
        spelled = next((end for end in suffixes(name) if end in config.spellings), None)
        if spelled is not None and values.is_floating_point():
            site = name.removesuffix(spelled).rstrip(".")
            role, op = config.spellings[spelled]
            if role in sites.setdefault(site, {}):
                raise FormatError(f"{printable(where)}: {printable(site)} has two tensors {role}; one is wanted")
            sites[site][role] = values
            if op is not None:
                ops[site] = op
        elif name.endswith(".base_layer.weight"):
            _put(copies, name.replace(".base_layer.", "."), values, where)
        elif any(suffix_hits(entries, module) for module in _parents(name)):
            _put(saved, name, values, where)
        elif name.endswith(".weight") and name.split(".")[-2] in _EMBEDDINGS:
            _put(copies, name, values, where)  # as PEFT saves them where the vocabulary was resized
        else:
            raise FormatError(
                f"{printable(where)}: no place for {printable(key)} ({SPELLINGS[values.dtype]}); "
                f"{config.peft_type} tensors end in {', '.join(config.spellings)}; was it renamed?"
            )
    _check_complete(config, sites, where)
    _resolve(config, sites, where)
    return Adapter(config, sites, saved, copies, ops, where, sha256)


def _put(held: dict[str, Tensor], name: str, values: Tensor, where: str) -> None:
    """Each tensor once; a copy may be there twice, if it is the same."""
    if name in held and not torch.equal(held[name], values):
        raise FormatError(f"{printable(where)}: two tensors are {printable(name)}; one is wanted; save it again")
    held[name] = values


def _parents(name: str) -> Iterator[str]:
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _check_complete(config: AdapterConfig, sites: Mapping[str, Mapping[str, Tensor]], where: str) -> None:
    """Each site has every role; an adapter has at least one site."""
    roles = {spelling.role for spelling in config.spellings.values()}
    if not sites:
        raise FormatError(f"{printable(where)}: no {config.peft_type} tensor in it; was it saved without its weights?")
    for site, held in sites.items():
        for role in sorted(roles - held.keys()):
            raise FormatError(
                f"{printable(where)}: {printable(site)} has no tensor {role}, only {', '.join(sorted(held))}; "
                "the file is incomplete; save or download it again"
            )


def _resolve(config: AdapterConfig, sites: Iterable[str], where: str) -> None:
    """FormatError where a site's settings cannot be told: a pattern takes too long."""
    try:
        for site in sites:
            config.method(site)
    except ConfigError as error:
        raise FormatError(f"{printable(where)}: {error}") from error


def check_shapes(
    site_name: str, given: Mapping[str, Tensor], wanted: Mapping[str, tuple[int, ...]], where: str
) -> None:
    """ShapeError where a tensor is not shaped as the method and the base's weight ask."""
    for role, shape in wanted.items():
        if tuple(given[role].shape) != shape:
            raise ShapeError(
                f"{printable(where)}: {printable(site_name)}: {role} is {list(given[role].shape)}, but "
                f"{list(shape)} is wanted by this base and the config; was it trained on another model?"
            )
