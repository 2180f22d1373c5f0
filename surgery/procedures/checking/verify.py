"""verify: every tensor of a merged checkpoint graded against what base and adapters give."""

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Event
from typing import NamedTuple

from surgery.codecs.plain import PLAIN_DTYPES
from surgery.core.adapter import Weighted
from surgery.core.site import Site, TensorInfo
from surgery.core.source import TILE_ELEMENTS, Source, row_tiles
from surgery.core.workers import default_workers, in_order
from surgery.formats.onnx.links import GRAPH, broken_links, is_exported
from surgery.hosts.change import Change
from surgery.hosts.checkpoint import Checkpoint
from surgery.hosts.encoded import held_in
from surgery.hosts.packing import Held
from surgery.hosts.views import told
from surgery.io.octets import Tally
from surgery.io.regular import contained, file_sha256
from surgery.io.tensor_file import TensorFile
from surgery.procedures.checking.config_grade import config_differs
from surgery.procedures.checking.grade import UNTOUCHED, Grade, carried, derived
from surgery.procedures.checking.held_grade import encoded, kept
from surgery.procedures.checking.spans import spans
from surgery.procedures.checking.verify_report import VerifyReport
from surgery.procedures.planning.plan import make_plan
from surgery.procedures.planning.treatment import Treatment
from surgery.procedures.writing.receipt import read_receipt
from surgery.procedures.writing.small_files import CARD, RECEIPT

_ANEW = "it is not the base's: the weight was quantized anew, by scales of its own"


class Piece(NamedTuple):
    """A tile of a tensor of the output, and how to grade it."""

    name: str
    grade: Callable[[], Grade]


def verify_checkpoint(  # noqa: PLR0913  # three things, and how they are looked at
    base: Checkpoint,
    adapters: Sequence[Weighted],
    out: Checkpoint,
    treatment: Treatment | None = None,
    *,
    probes: int = 0,
    workers: int | None = None,
) -> VerifyReport:
    """Grade every tensor of `out` against `adapters` merged over `base`, by any tool; `workers` tiles at once.

    `probes` inputs measure what a format leaves of the adapters' effect on the outputs of each weight.
    """
    # What is right where two were tied.
    treatment = replace(treatment or Treatment(), tied="untie", into=_into(base, out))
    plan = make_plan(
        base, adapters, treatment, () if treatment.into != "keep" else base.packed.keys() - out.packed.keys()
    )
    plan.require()
    plan = plan.probed(probes)
    grades: dict[str, Grade] = {}
    pieces = _pieces(base, plan.source(base), out, plan.changes)
    for name, grade in in_order(_graded, pieces, workers or default_workers()):
        grades[name] = grades[name].worse(grade) if name in grades else grade
    why = config_differs(base, plan.config or base.config, out, kept=treatment.into == "keep")
    if why:
        grades["config.json"] = Grade("different", why=why)
    base.check_unchanged()
    out.check_unchanged()
    return VerifyReport(out.path, _links(out.folder) | grades)


def _into(base: Checkpoint, out: Checkpoint) -> str | None:
    """What the weights went into, as their tensors tell."""
    anew = [one for name, one in out.packed.items() if not _is_kept(base, name, one)]
    forms = {one.form for one in anew}
    if anew:
        return forms.pop() if len(forms) == 1 else None
    return "keep" if out.packed else None


def _is_kept(base: Checkpoint, name: str, held: Held) -> bool:
    """Are its codes in the base's format?"""
    there = base.packed.get(name)
    told = [(one.codec.name, one.form, one.first) for one in (there, held) if one is not None]
    return len(told) == 2 and told[0] == told[1]


def verify_receipt(folder: Path, workers: int | None = None) -> VerifyReport:
    """Check the files of `folder`, `workers` at once, against its own receipt, and the links of a graph.

    InputError if it has neither.
    """
    if is_exported(folder) and not os.path.lexists(folder / RECEIPT):
        return VerifyReport(folder, _links(folder))
    receipt = read_receipt(folder)
    wanted = dict(receipt["untouched"]) | {name: one["sha256"] for name, one in receipt["changed"].items()}
    grades = {}
    with Checkpoint(folder) as out:
        for file, tally in zip(out.files, _tallies(out.files, workers or default_workers()), strict=True):
            for name, digest in tally.tensors.items():
                same = wanted.pop(name, None) == digest
                grades[name] = Grade("recorded") if same else Grade("different", why="its sha256 is not the receipt's")
            if receipt["files"].get(file.path.name) != tally.whole.hexdigest():
                why = "the file's sha256 is not the receipt's"
                grades[file.path.name] = Grade("different", why=why)
        out.check_unchanged()
    for name, digest in receipt["carried"].items():
        path = folder / name
        if name != CARD and (not path.is_file() or file_sha256(contained(folder, name)) != digest):
            grades[name] = Grade("different", why="the file's sha256 is not the receipt's")
    for name in wanted:
        grades[name] = Grade("different", why="it is missing")
    for path in sorted(folder.glob("*.safetensors")):
        if path.name not in receipt["files"]:
            grades[path.name] = Grade("different", why="a file of weights that the receipt does not know")
    return VerifyReport(folder, _links(folder) | grades)


def _links(folder: Path) -> dict[str, Grade]:
    """Whether a graph that lies in the folder still finds its weights."""
    if not is_exported(folder):
        return {}
    broken = broken_links(folder)
    told = {GRAPH: Grade("recorded")}
    return told | {name: Grade("different", why=why) for name, why in broken.items()}


def _graded(piece: Piece) -> tuple[str, Grade]:
    return piece.name, piece.grade()


def _pieces(base: Checkpoint, source: Source, out: Checkpoint, changes: Iterable[Change]) -> Iterator[Piece]:
    """All tensors in the base's order, then those that a change adds, then those that nothing explains.

    `source` is the base as the changes are laid over it.
    """
    changed = {change.site.weight.name: change for change in changes}
    wanted = {info.name: info for info in base.weights()}
    wanted |= {name: change.site.weight for name, change in changed.items()}
    found = {info.name: info for info in out.weights()}
    for name, info in wanted.items():
        there, change = found.pop(name, None), changed.get(name)
        refused = _refused(info, there, change)
        if there is None or refused:
            yield Piece(name, partial(Grade, "different", why=refused))
        elif name in out.packed:
            alike = _is_kept(base, name, out.packed[name])
            yield from _kept_pieces(base, out, name, change) if alike else _anew_pieces(source, out, info, change)
        elif change is None and there.dtype == info.dtype and name not in base.packed:
            yield from (Piece(name, partial(carried, base, out, name, span)) for span in spans(info))
        else:
            change = change or Change(Site(name, {"weight": info}), info.torch_dtype)
            change = replace(change, dtype=there.torch_dtype, keep=False, into="", feedback=False)
            change = told(source, change)
            started = change.started()
            shape = change.site.laid(info).shape
            elements = max(1, math.prod(shape)) if change.as_peft else TILE_ELEMENTS
            for rows in row_tiles(shape, elements, change.site.together):
                yield Piece(name, partial(derived, source, out, change, started, rows))
    for name in found:
        yield Piece(name, partial(Grade, "different", why="it is not in the base"))


def _anew_pieces(source: Source, out: Checkpoint, info: TensorInfo, change: Change | None) -> Iterator[Piece]:
    """Of a weight that went into a form: one piece, for its scales are of all of it."""
    found = out.packed[info.name]
    form, dtype = found.form, found.codec.dtype(found.settings) or found.plain.torch_dtype
    if form is None:
        yield Piece(info.name, partial(Grade, "different", why="it is held in a form that no merge goes into"))
        return
    change = change or Change(Site(info.name, {"weight": info}), dtype)
    yield Piece(info.name, partial(encoded, source, out, held_in(replace(change, dtype=dtype), form)))


def _kept_pieces(base: Checkpoint, out: Checkpoint, name: str, change: Change | None) -> Iterator[Piece]:
    """Of a weight that keeps its format: the codes, where an adapter changes them, and all else by its bytes."""
    held = base.packed[name]
    for info in held.tensors.values():
        if change is None or info != held.first:
            why = UNTOUCHED if change is None else _ANEW
            if info.name not in out.at or out.at[info.name][1].info != info:
                yield Piece(info.name, partial(Grade, "different", why=why))
                continue
            yield from (Piece(info.name, partial(carried, base, out, info.name, span, why)) for span in spans(info))
    if change is not None:
        yield Piece(change.site.written, partial(kept, base, out, change))


def _refused(info: TensorInfo, there: TensorInfo | None, change: Change | None) -> str:
    """Why a tensor is different by its header alone, or nothing."""
    if there is None:
        return "it is missing"
    if there.shape != info.shape:
        return f"it is {list(there.shape)}, {list(info.shape)} is wanted"
    cast = change is not None or there.dtype != info.dtype
    if cast and not {there.dtype, info.dtype} <= set(PLAIN_DTYPES):
        return f"it became {str(there.dtype).removeprefix('torch.')}"
    return ""


def _tallies(files: Sequence[TensorFile], workers: int) -> Iterator[Tally]:
    stop = Event()
    return in_order(partial(_tally, stop), files, min(workers, len(files)), stop)


def _tally(stop: Event, file: TensorFile) -> Tally:
    """The hashes of a file, unless another has failed meanwhile: then of a part of it."""
    tally = Tally(file.header.raw)
    for entry in file.header.entries:
        for chunk in file.chunks(entry):
            if stop.is_set():
                return tally
            tally.feed(chunk)
        tally.end(entry.info.name)
    return tally
