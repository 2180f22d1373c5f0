"""What functions on files are given: a base, and adapters with their weights; found, and opened."""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

from surgery.adapters.out_proj import Scale, check_scale
from surgery.adapters.peft import CONFIG, TENSORS, open_adapter
from surgery.core.adapter import Weighted
from surgery.core.option_checks import is_finite
from surgery.errors import InputError, UsageError, printable
from surgery.hosts.calibration import Calibration
from surgery.hosts.checkpoint import Checkpoint
from surgery.integrations import transformers as hugging
from surgery.io.hub import locate, located
from surgery.io.misplaced import refuse_other
from surgery.procedures.planning.treatment import Treatment

Where = str | PathLike[str]  # a path, or owner/name[@revision] on the Hub
Given = Where | tuple[Where, float]  # an adapter, which may have a weight
Adapters = Given | Sequence[Given]  # one, or several in their order


def checkpoint(where: Where) -> Checkpoint:
    """Open, with what is known of where it came from."""
    place = located(where)
    _refuse_adapter(place.path)
    found = Checkpoint(place.path)
    found.hub_id, found.commit = place.hub_id, place.commit
    found.names, found.linears = partial(hugging.name_map, found.config), partial(hugging.linears_of, found)
    found.in_memory, found.ties = partial(hugging.names_in_memory, found), partial(hugging.ties_in_memory, found)
    return found


def refuse_swapped(base: Where, adapters: Adapters) -> None:
    """InputError where an adapter is given as the base, and a model as the first adapter; both as paths."""
    for where, _ in [_with_weight(one) for one in _listed(adapters)][:1]:
        there = all(map(os.path.exists, (base, where)))  # false for a name too long to be one
        if there and is_adapter(Path(base)) and _is_model(Path(where)):
            raise InputError(
                f"{printable(base)}: it is an adapter, and {printable(where)} a model; BASE comes first; swap the two"
            )


def is_adapter(path: Path) -> bool:
    """The file of one, or its folder, without other weights beside it."""
    return _is_its_file(path) or ((path / CONFIG).is_file() and _weights(path) == {TENSORS})


def _is_its_file(path: Path) -> bool:
    return path.name == TENSORS and path.is_file()


def _is_model(path: Path) -> bool:
    """One of safetensors."""
    if path.is_file():
        return path.suffix == ".safetensors" and not (path.parent / CONFIG).is_file()
    return bool(_weights(path)) and TENSORS not in _weights(path)


def _weights(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*.safetensors")}


def merged_folder(where: Where) -> Path:
    """Where a merge of ours is to lie. InputError for an adapter, or for a file that is no model."""
    path = locate(where)
    _refuse_adapter(path)
    if path.is_file():
        refuse_other(path)
    return path


def _refuse_adapter(path: Path) -> None:
    """InputError for a folder of an adapter, without a model beside, or the file of one."""
    alone = (path / TENSORS).is_file() and not (path / "config.json").exists()
    if _is_its_file(path) or (alone and (path / CONFIG).is_file()):
        raise InputError(
            f"{printable(path)}: it is an adapter; a model is wanted; a merge names BASE first, and OUT last"
        )


def weighted(adapters: Adapters, mha_out_proj_scale: int | None = None) -> list[Weighted]:
    """UsageError for what names no adapter, and for a weight that is no finite number."""
    scale = check_scale(mha_out_proj_scale)
    return [_opened(*_with_weight(one), scale) for one in _listed(adapters)]


def _listed(adapters: Any) -> Iterable[Any]:
    """One alone, or with its weight, is a list of one."""
    match adapters:
        case str() | PathLike() | (_, int() | float()):
            return [adapters]
        case Sequence():
            return adapters
    raise _no_adapter(adapters)


def _with_weight(given: Any) -> tuple[Where, float]:
    match given:
        case str() | PathLike():
            return given, 1.0
        case (str() | PathLike() as where, weight) if is_finite(weight):
            return where, float(weight)
        case (str() | PathLike() as where, weight):
            raise UsageError(f"{printable(where)}: its weight is {printable(weight)}; a finite number is wanted")
    raise _no_adapter(given)


def _no_adapter(given: object) -> UsageError:
    wanted = "a path or Hub id, (path, weight), or a list of those is wanted"
    return UsageError(f"adapters: {printable(repr(given))} is none; {wanted}")


def _opened(where: Where, weight: float, scale: Scale | None) -> Weighted:
    place = located(where)
    adapter = open_adapter(place.path, scale=scale)
    return Weighted(replace(adapter, hub_id=place.hub_id, commit=place.commit), weight)


@contextmanager
def calibrated(treatment: Treatment, calibration: Where | None) -> Iterator[Treatment]:
    """The treatment with these inputs, which are open meanwhile. UsageError where it does not ask for feedback."""
    if calibration is None:
        yield treatment
        return
    with Calibration(locate(calibration)) as found:
        yield treatment.calibrated_by(found)
