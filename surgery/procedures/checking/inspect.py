"""inspect: the sites of a model, in memory or in files, or the tensors of an adapter's files."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from surgery.adapters.peft import CONFIG, TENSORS, read_adapter
from surgery.core.adapter import Adapter
from surgery.core.report import Report
from surgery.core.site import Site
from surgery.hosts.checkpoint import Checkpoint
from surgery.hosts.model import model_sites
from surgery.hosts.quantized import codec_name, is_quantized, packed_of_layer, unready
from surgery.procedures.places.op_choice import layout_by_name
from surgery.procedures.places.tying import ties_head
from surgery.procedures.writing.receipt import base_fingerprint


class Row(NamedTuple):
    """A site, or a tensor of an adapter."""

    name: str
    op: str
    shape: tuple[int, ...]
    dtype: str
    size_bytes: int
    tied: str = ""


@dataclass(frozen=True, repr=False)
class Inspection(Report):
    """What lies at a path: `kind` is "model" or "adapter", `rows` are its sites, or its tensors, with their sizes."""

    kind: str
    rows: tuple[Row, ...]
    config: dict[str, Any]
    sha256: str | None = None  # of a model only where it was asked for, since all of it is read

    def summary(self) -> str:
        """One line."""
        total = sum(row.size_bytes for row in self.rows)
        return f"{self.kind}: {len(self.rows)} {'sites' if self.kind == 'model' else 'tensors'}, {total / 1e6:.1f} MB"

    def to_json(self) -> dict[str, Any]:
        rows = [{**row._asdict(), "shape": list(row.shape)} for row in self.rows]
        return {"kind": self.kind, "config": self.config, "rows": rows, "sha256": self.sha256}


def inspect_model(root: nn.Module) -> Inspection:
    """The sites of a live model: its paths are what `target_modules` names."""
    modules = dict(root.named_modules())
    return Inspection("model", tuple(_live_row(one, modules[one.name]) for one in model_sites(root)), {})


def inspect(path: Path, sha256: bool = False) -> Inspection:
    """InputError if neither a model nor an adapter lies at `path`. With `sha256` the whole model is read."""
    if (path / CONFIG).is_file() or path.name == TENSORS:
        adapter = read_adapter(path)
        return Inspection("adapter", tuple(_adapter_rows(adapter)), adapter.config.to_json(), adapter.digest)
    with Checkpoint(path) as base:
        rows = tuple(_stored_row(base, site) for site in base.sites())
        return Inspection("model", rows, base.config, base_fingerprint(base, base.hash_reads()) if sha256 else None)


def _adapter_rows(adapter: Adapter) -> Iterator[Row]:
    for site, params in sorted(adapter.sites.items()):
        for role, values in sorted(params.items()):
            yield _tensor_row(f"{site} {role}", adapter.ops.get(site, ""), values)
    for name, values in sorted({**adapter.saved, **adapter.copies}.items()):
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
