"""PEFT's adapter folder: adapter_config.json and adapter_model.safetensors."""

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from surgery.adapters import out_proj
from surgery.adapters.found import Found
from surgery.adapters.out_proj import Scale
from surgery.adapters.parts import MODEL
from surgery.adapters.sorting import PREFIX, sorted_out
from surgery.core.adapter import Adapter, shapes_of
from surgery.core.arithmetic import all_finite
from surgery.core.config import AdapterConfig
from surgery.core.method import Params
from surgery.core.sharded import whole
from surgery.core.site import TensorInfo
from surgery.core.spec import Spec
from surgery.errors import AbsentError, FormatError, InputError, ShapeError, ValueRangeError, printable
from surgery.io.fingerprint import read_base_print
from surgery.io.header import Entry, encode_header
from surgery.io.misplaced import folder_in_words, refuse_other
from surgery.io.octets import octets, tensor_from
from surgery.io.regular import contained
from surgery.io.strict_json import ordered_json_bytes, parse_json, read_bytes
from surgery.io.tensor_file import TensorFile, read_span
from surgery.methods import METHODS

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"

# PEFT's methods that are more than another weight, and why.
_PROMPT = "it puts tokens of its own before the input"
_NO_WEIGHT = {
    "ADAPTION_PROMPT": _PROMPT,
    "CARTRIDGE": _PROMPT,
    "CPT": _PROMPT,
    "LILY": "it chooses among experts by the input",
    "MULTITASK_PROMPT_TUNING": _PROMPT,
    "POLY": "it mixes adapters by the task",
    "PREFIX_TUNING": _PROMPT,
    "PROMPT_TUNING": _PROMPT,
    "P_TUNING": _PROMPT,
    "SHADOW": "it keeps a state beside the layers",
    "XLORA": "it mixes adapters by the input",
}
_UNTOLD = {
    "ADAMSS": "its files do not tell which outputs a subspace of it is of: PEFT takes that anew from the base at hand, "
    "by scikit-learn's k-means; merge it in PEFT, over the base that it was trained on",
}


def read_adapter(path: Path, scale: Scale | None = None) -> Adapter:
    """The adapter in a folder, or in one file beside its config. Every tensor has its place, or InputError."""
    adapter = open_adapter(path, scale=scale)
    return replace(adapter, sites={name: dict(params) for name, params in adapter.sites.items()})


def open_adapter(path: Path, config_name: str = CONFIG, scale: Scale | None = None) -> Adapter:
    """The same, but the tensors of its sites stay in the file, to be read when they are asked for.

    Each has the bytes that it had at first, or is refused. `scale` is how often a delta of an attention layer's
    out_proj counts, if that is not left to the file's `peft_version`.
    """
    folder, file = (path, contained(path, TENSORS)) if path.is_dir() else (path.parent, path)
    if config_name == CONFIG:
        _refuse_pickles(folder, file)
    if not path.is_dir():
        refuse_other(path)
    if not path.is_dir() and not (folder / config_name).exists():
        raise AbsentError(
            f"{printable(path)}: no {config_name} beside it; an adapter as PEFT writes it is wanted, its folder or its "
            "file; diffusers and kohya write others"
        )
    told = read_bytes(contained(folder, config_name), "an adapter's config")
    where = printable(folder / config_name)
    parsed = parse_json(told, where)
    config = config_from(parsed, where)
    tensors, sha256 = _read_tensors(file)
    sha256[config_name] = hashlib.sha256(told).hexdigest()
    found = sorted_out(config, tensors, str(path), sha256)
    found = _counted(found, parsed.get("peft_version"), scale)
    return replace(found, files=(config_name, file.name), trained_on=read_base_print(folder))


def config_from(data: Mapping[str, Any], where: str) -> AdapterConfig:
    """The config that `data` spells; FormatError for a `peft_type` that is none of ours."""
    kind = data.get("peft_type")
    if kind is None:
        raise FormatError(
            f"{where}: it has no peft_type, which says what the adapter computes; one of {', '.join(METHODS)} is "
            "wanted; is it an adapter's config?"
        )
    if not isinstance(kind, str) or kind not in METHODS:
        known = f"supported are {', '.join(METHODS)}; see whether PEFT reads it"
        alone = _NO_WEIGHT.get(kind) if isinstance(kind, str) else None
        why = f"{alone}, which no merged weight can do; run it in PEFT" if alone else known
        why = _UNTOLD.get(kind, why) if isinstance(kind, str) else why
        raise FormatError(f"{where}: peft_type is {printable(kind)!r}; {why}")
    return METHODS[kind].from_json(data, where)


def adapter_of(config: AdapterConfig, tensors: Mapping[str, Tensor], where: str) -> Adapter:
    """The adapter that tensors in memory are, each named as in a file. Every one has its place, or FormatError."""
    found = [
        Found(TensorInfo(key, values.dtype, tuple(values.shape)), tensors.__getitem__)
        for key, values in tensors.items()
    ]
    adapter = _counted(sorted_out(config, found, where, {}), None, None)
    return replace(adapter, sites={name: dict(params) for name, params in adapter.sites.items()})


def adapter_bytes(tensors: Mapping[str, Tensor], prefix: str = PREFIX, shared: Collection[str] = ()) -> bytes:
    """The content of adapter_model.safetensors, for tensors by their name in the base as PEFT ends it.

    Those of `shared` are in no place of the base.
    """
    above = prefix.removesuffix(PREFIX.removeprefix(MODEL))
    named = {(above if name.partition(".")[0] in shared else prefix) + name: v for name, v in tensors.items()}
    found = [(name, whole(named[name].detach()).cpu().contiguous()) for name in sorted(named)]
    infos = [TensorInfo(key, values.dtype, tuple(values.shape)) for key, values in found]
    return b"".join([encode_header(infos, {"format": "pt"}), *(octets(values) for _, values in found)])


def config_bytes(config: AdapterConfig) -> bytes:
    """The bytes of adapter_config.json. PEFT sorts patterns too, and then another may be the first that hits."""
    return ordered_json_bytes(config.to_json())


def _refuse_pickles(folder: Path, file: Path) -> None:
    pickled = file if file.suffix in (".bin", ".pt", ".pth") else folder / "adapter_model.bin"
    if pickled.exists() and (pickled == file or not file.exists()):
        raise FormatError(
            f"{printable(pickled)}: a pickle, which can run code when it is read; {TENSORS} is wanted; "
            "load it in PEFT and save it again"
        )
    if not file.exists():
        told = (
            "it looks like a model; an adapter is wanted; a merge names BASE first, and OUT last"
            if _has_weights(folder)
            else ""
        )
        raise AbsentError(f"{printable(folder)}: it holds no {TENSORS}: {told or folder_in_words(folder)}")


def _has_weights(folder: Path) -> bool:
    return any(folder.glob("*.safetensors"))


def _read_tensors(path: Path) -> tuple[list[Found], dict[str, str]]:
    file = TensorFile(path)
    try:
        tensors = _Tensors(path, file.entries)
        found, whole = [], hashlib.sha256(file.header.raw)
        for info, start in file.header.entries:
            one = hashlib.sha256()
            for chunk in file.chunks(Entry(info, start)):
                whole.update(chunk)
                one.update(chunk)
            tensors.sha256[info.name] = one.hexdigest()
            try:
                _ = info.torch_dtype
            except FormatError as error:
                raise FormatError(f"{file.where}: {error}") from error
            found.append(Found(info, tensors.load))
        file.check_unchanged()
        return found, tensors.sha256 | {path.name: whole.hexdigest()}
    finally:
        file.close()


class _Tensors:
    """The tensors of a file, read anew at each call; `sha256` is what they are known to be."""

    def __init__(self, path: Path, entries: Mapping[str, Entry]) -> None:
        self.path, self.entries = path, entries
        self.sha256: dict[str, str] = {}

    def load(self, name: str) -> Tensor:
        info, start = self.entries[name]
        data = read_span(self.path, start, info.nbytes, "an adapter's tensors")
        if hashlib.sha256(data).hexdigest() != self.sha256[name]:
            raise InputError(
                f"{printable(self.path)}: {printable(name)} changed while it was read; let no one write to it, "
                "and run again"
            )
        return tensor_from(data, info.torch_dtype, info.shape)


def _counted(adapter: Adapter, version: object, told: Scale | None) -> Adapter:
    """The adapter of a file, each of whose deltas counts once."""
    out_proj.check_pairs(adapter.sites, adapter.where)
    scale = out_proj.scale_of(list(adapter.sites), version, told, adapter.where)
    return replace(adapter, sites=out_proj.counted(adapter.sites, scale), mha_out_proj_scale=scale)


def check_shapes(site_name: str, given: Params, wanted: Mapping[str, Spec], where: str) -> None:
    """ShapeError where tensors are not those that the method and the base's weight ask for, or not in their shapes."""
    shapes = shapes_of(given)
    if shapes.keys() != wanted.keys():
        raise ShapeError(
            f"{printable(where)}: {printable(site_name)}: it has {', '.join(sorted(shapes))}, but "
            f"{', '.join(sorted(wanted))} is wanted by this base and the config; was it trained on another model?"
        )
    for role, spec in wanted.items():
        found = shapes[role]
        if not spec.fits(found):
            least = f", or longer along axis {', '.join(map(str, spec.longer))}," if spec.longer else ""
            raise ShapeError(
                f"{printable(where)}: {printable(site_name)}: {role} is {list(found)}, but "
                f"{list(spec.shape)}{least} is wanted by this base and the config; was it trained on another model?"
            )


def check_finite(site_name: str, given: Params, where: str, checked: Collection[str] = ()) -> None:
    """ValueRangeError for what no merge can be made with, told before one begins; some roles are checked already."""
    for role in sorted(given.keys() - checked):
        if not all_finite(given[role]):
            raise ValueRangeError(
                f"{printable(where)}: {printable(site_name)}: {role} holds NaN or infinity; finite numbers are wanted; "
                "train or download it again"
            )
