"""inspect: the sites of a model, in memory or in files, or the tensors of an adapter's files."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from surgery.adapters.peft import CONFIG, TENSORS, read_adapter
from surgery.core.adapter import Adapter
from surgery.core.report import Report, in_units
from surgery.core.site import Site
from surgery.errors import printable, visible
from surgery.hosts.checkpoint import Checkpoint
from surgery.hosts.model import model_sites
from surgery.hosts.quantized import codec_name, is_quantized, packed_of_layer, unready
from surgery.procedures.places.op_choice import layout_by_name
from surgery.procedures.places.tying import ties_head
from surgery.procedures.writing.receipt import base_fingerprint

_ENDS = 8  # of the names of modules, that are shown


class Row(NamedTuple):
    """A site, or a tensor of an adapter."""

    name: str
    op: str
    shape: tuple[int, ...]
    dtype: str
    size_bytes: int
    tied: str = ""


@dataclass(frozen=True)
class AdapterTold:
    """What an adapter is: all values that its sites have, and two fields of its config."""

    method: list[str]
    r: list[float]
    lora_alpha: list[float]
    alpha: list[float]
    target_modules: str | list[str] | None
    base_model_name_or_path: str | None

    def words(self) -> Iterator[str]:
        """Those that there are."""
        yield ", ".join(self.method)
        for name, values in (("r", self.r), ("lora_alpha", self.lora_alpha), ("alpha", self.alpha)):
            if values:
                yield f"{name} {' to '.join(f'{one:g}' for one in dict.fromkeys((values[0], values[-1])))}"
        if isinstance(self.target_modules, str):
            yield f"target_modules '{visible(self.target_modules[:200])}'"
        elif self.target_modules:
            ends = list(dict.fromkeys(name.rpartition(".")[2] for name in self.target_modules))
            more = f" and {len(ends) - _ENDS} more" if len(ends) > _ENDS else ""
            yield f"target_modules {', '.join(map(printable, ends[:_ENDS]))}{more}"
        if self.base_model_name_or_path:
            yield f"base {printable(self.base_model_name_or_path)}"


@dataclass(frozen=True, repr=False)
class Inspection(Report):
    """What lies at a path: `kind` is "model" or "adapter", `rows` are its sites, or its tensors, with their sizes."""

    kind: str
    rows: tuple[Row, ...]
    config: dict[str, Any]
    sha256: str | None = None  # of a model only where it was asked for, since all of it is read
    adapter: AdapterTold | None = None

    def summary(self) -> str:
        """One line."""
        total = sum(row.size_bytes for row in self.rows)
        size = f"{len(self.rows)} {'sites' if self.kind == 'model' else 'tensors'}, {in_units(total)}"
        return f"{self.kind}: {'; '.join([*(self.adapter.words() if self.adapter else ()), size])}"

    def to_json(self) -> dict[str, Any]:
        rows = [{**row._asdict(), "shape": list(row.shape)} for row in self.rows]
        adapter = None if self.adapter is None else asdict(self.adapter)
        return {"kind": self.kind, "config": self.config, "adapter": adapter, "rows": rows, "sha256": self.sha256}


def inspect_model(root: nn.Module) -> Inspection:
    """The sites of a live model: its paths are what `target_modules` names."""
    modules = dict(root.named_modules())
    return Inspection("model", tuple(_live_row(one, modules[one.name]) for one in model_sites(root)), {})


def inspect(path: Path, sha256: bool = False) -> Inspection:
    """InputError if neither a model nor an adapter lies at `path`. With `sha256` the whole model is read."""
    if (path / CONFIG).is_file() or (path.name == TENSORS and path.is_file()):
        adapter = read_adapter(path)
        config = adapter.config.to_json()
        return Inspection("adapter", tuple(_adapter_rows(adapter)), config, adapter.digest, _told(adapter, config))
    with Checkpoint(path) as base:
        rows = tuple(_stored_row(base, site) for site in base.sites())
        return Inspection("model", rows, base.config, base_fingerprint(base, base.hash_reads()) if sha256 else None)


def _told(adapter: Adapter, config: Mapping[str, Any]) -> AdapterTold:
    whole = adapter.config.title
    methods = {whole} if whole else {adapter.config.method(site).name for site in adapter.sites or [""]}
    numbers = [adapter.config.told(site) for site in adapter.sites]
    r, lora_alpha, alpha = (
        sorted({one[name] for one in numbers if name in one}) for name in ("r", "lora_alpha", "alpha")
    )
    where = config["target_modules"], config["base_model_name_or_path"]
    return AdapterTold(sorted(methods), r, lora_alpha, alpha, *where)


def _adapter_rows(adapter: Adapter) -> Iterator[Row]:
    for site, params in sorted(adapter.sites.items()):
        for role in sorted(params.keys() - adapter.shared):
            yield _tensor_row(f"{site} {role}", adapter.ops.get(site, ""), params[role])
    for name, values in sorted({**adapter.saved, **adapter.copies, **adapter.named_shared()}.items()):
        yield _tensor_row(name, "", values)


def _tensor_row(name: str, op: str, values: Tensor) -> Row:
    return Row(name, op, tuple(values.shape), str(values.dtype).removeprefix("torch."), values.nbytes)


def _row(site: Site, op: str, tied: str) -> Row:
    info = site.tensors.get("weight") or next(iter(site.tensors.values()))
    size = sum(one.nbytes for one in site.tensors.values())
    return Row(site.name or info.name, op, info.shape, str(info.dtype).removeprefix("torch."), size, tied)


def _live_row(site: Site, module: nn.Module) -> Row:
    row = _row(site, site.op.name if site.op else "", ", ".join(site.aliases + site.tied))
    if not is_quantized(module) or unready(module) is not None:
        return row
    held = sum(values.nbytes for values in packed_of_layer(module, site.name).tensors.values())
    return row._replace(dtype=codec_name(module), size_bytes=row.size_bytes - site.weight.nbytes + held)


def _stored_row(base: Checkpoint, site: Site) -> Row:
    op = likely_op(base, site)
    row = _row(site, op, "output head" if op == "embedding" and ties_head(base, site.weight) else "")
    packed = [base.packed[one.name] for one in site.tensors.values() if one.name in base.packed]
    if not packed:
        return row
    held = sum(one.nbytes for each in packed for one in each.tensors.values())
    plain = sum(each.plain.nbytes for each in packed)
    return row._replace(dtype=packed[0].codec.name, size_bytes=row.size_bytes - plain + held)


def likely_op(base: Checkpoint, site: Site) -> str:
    """By name and family alone: a checkpoint does not say."""
    last = site.name.rpartition(".")[2]
    if "weight" not in site.tensors or len(site.weight.shape) != 2:
        return ""
    embeds = "emb" in last or last in ("wte", "wpe")
    return "embedding" if embeds else layout_by_name(base.config, site.name)
