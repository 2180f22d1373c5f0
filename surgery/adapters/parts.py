"""Parts: a tensor that all sites of an adapter share, whose rows its file holds one by one, numbered."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from surgery.core.config import AdapterConfig
from surgery.errors import FormatError, printable

MODEL = "base_model."  # what PEFT puts before the names of tensors that all sites share
_NUMBER = re.compile(r"0|[1-9][0-9]{0,8}")


def part_of(config: AdapterConfig, name: str) -> tuple[str, int] | None:
    """The role of a shared tensor, and which of its rows a file means by `name`; None where it means none."""
    path, _, number = name.rpartition(".")
    role = config.shared.get(path.removeprefix(MODEL)) if config.shared_in_parts else None
    return (role, int(number)) if role is not None and _NUMBER.fullmatch(number) else None


def joined(role: str, parts: Mapping[int, Tensor], where: str) -> Tensor:
    """The tensor. FormatError unless its rows are numbered from 0 on, and alike."""
    rows = [parts[at] for at in range(len(parts)) if at in parts]
    if len(rows) < len(parts) or len({(one.dtype, one.shape) for one in rows}) > 1:
        numbers = ", ".join(map(str, sorted(parts)))
        raise FormatError(
            f"{printable(where)}: parts {numbers} of {role} are in it; all from 0 on, in one shape, are wanted; the "
            "file is incomplete; save it again"
        )
    return torch.stack(rows)
