"""Expected: the hashes by which a caller, or an adapter, tells which base and adapters are meant."""

import re
from collections.abc import Sequence

from surgery.core.adapter import Weighted
from surgery.errors import InputError, UsageError, printable
from surgery.hosts.checkpoint import Checkpoint
from surgery.hosts.reading import Reading
from surgery.io.fingerprint import BASE_PRINT
from surgery.procedures.planning.plan import Plan
from surgery.procedures.writing.receipt import base_fingerprint


def check_adapters(adapters: Sequence[Weighted], expected: str | Sequence[str] | None) -> None:
    """InputError unless the adapters are the expected ones, in their order. UsageError for another number of them."""
    if expected is None:
        return
    wanted = [expected] if isinstance(expected, str) else list(expected)
    for digest in wanted:
        check_sha256(digest)
    if len(wanted) != len(adapters):
        raise UsageError(f"{len(wanted)} hashes are expected of {len(adapters)} adapters; give one for each")
    for (adapter, _), digest in zip(adapters, wanted, strict=True):
        if adapter.digest != digest.lower():
            raise InputError(
                f"{printable(adapter.where)}: its sha256 is {adapter.digest}, expected is {printable(digest)}; "
                "name the right adapter, or expect this hash"
            )


def check_sha256(digest: str | None) -> None:
    """UsageError for what is no sha256."""
    if digest is not None and not re.fullmatch(r"[0-9a-fA-F]{64}", digest):
        raise UsageError(f"{printable(digest)!r} is no sha256; 64 hexadecimal digits are wanted; see `surgery inspect`")


def check_base(
    base: Checkpoint, adapters: Sequence[Weighted], plan: Plan, readings: Sequence[Reading], wanted: str | None
) -> None:
    """InputError if the base is not the expected one, or not the one that an adapter was trained on."""
    if wanted is not None and base_fingerprint(base, readings) != wanted.lower():
        raise InputError(
            f"{printable(base.path)}: its sha256 is {base_fingerprint(base, readings)}, expected is "
            f"{printable(wanted)}; name the right base, or expect this hash"
        )
    begun = {one.site.weight.name: one.begins.weight.name for one in plan.changes if one.begins is not None}
    for (adapter, _), naming in zip(adapters, plan.namings, strict=True):
        for name, (info, digest) in adapter.trained_on.items():
            there = begun.get(naming.of(name), naming.of(name))  # a tied head is the embedding
            if there not in base.at:
                continue
            held, found = base.at[there][1].info, readings[base.file_of(there)].tensors.get(there)
            if (held.dtype, held.shape) == (info.dtype, info.shape) and found != digest:
                raise InputError(
                    f"{printable(adapter.where)}: it was trained on another base: {printable(name)} had sha256 "
                    f"{printable(digest)} there, and here {found}; name that base, or remove the adapter's {BASE_PRINT}"
                )
