"""The out_proj of an adapted nn.MultiheadAttention, whose delta PEFT up to 0.21.2 counts twice, in forward and merge.

Here it counts once, as that of any layer. So B of a file that PEFT meant to count twice is doubled when it is read, and
B is halved when it is written, in PEFT's format of 0.21.2; both are exact.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal

from torch import Tensor

from surgery.core.adapter import Adapter, Stored
from surgery.core.method import Params
from surgery.core.option_checks import check_whole
from surgery.errors import FormatError, UsageError, printable
from surgery.methods.lora import OUT_PROJ

Scale = Literal[1, 2]
_KNOWN = (0, 21, 2)
_NUMBER = re.compile(r"[0-9]{1,9}")


def check_scale(scale: object) -> Scale | None:
    """UsageError for what is none."""
    if scale is None:
        return None
    return 1 if check_whole("`mha_out_proj_scale`", scale, 1, 2) == 1 else 2


def scale_of(sites: Sequence[str], version: object, told: Scale | None, where: str) -> Scale | None:
    """How often a file's deltas of out_proj count; None where it has none. FormatError where nothing tells."""
    found = next(_out_projs(sites), None)
    if found is None or told is not None:
        return None if found is None else told
    if tuple(int(number) for number in _NUMBER.findall(str(version))[:3]) > _KNOWN:
        raise FormatError(
            f"{printable(where)}: {printable(found)}: its delta counts twice up to peft_version 0.21.2, and whether it "
            f"does in {printable(version)} is not known; say it with `mha_out_proj_scale=1` or `mha_out_proj_scale=2`"
        )
    return 2


def notes(adapter: Adapter) -> list[str]:
    """What was taken of each, to be said aloud."""
    many = "once" if adapter.mha_out_proj_scale == 1 else "twice, as in PEFT up to 0.21.2"
    where, chosen = printable(adapter.where), f"mha_out_proj_scale={adapter.mha_out_proj_scale}"
    return [f"{where}: {printable(site)}: its delta counts {many} ({chosen})" for site in _out_projs(adapter.sites)]


def refuse_other(adapter: Adapter, arithmetic: str) -> None:
    """UsageError where PEFT is to be followed, which counts each twice, and once is wanted."""
    if arithmetic != "exact" and adapter.mha_out_proj_scale == 1:
        raise UsageError(
            f"{printable(adapter.where)}: `mha_out_proj_scale=1` and `arithmetic={arithmetic}`; PEFT counts the "
            "delta of out_proj twice; leave one of the two out"
        )


def _out_projs(sites: Iterable[str]) -> Iterator[str]:
    return (site for site in sites if site.endswith(OUT_PROJ))


def check_pairs(sites: Mapping[str, Params], where: str) -> None:
    """FormatError for an attention layer without its out_proj, or one that is spelled in another way."""
    for site in sites:
        owner, _, inner = site.partition(".base_layer.")
        if f"{site}.out_proj" in sites or (inner and owner not in sites):
            raise FormatError(
                f"{printable(where)}: {printable(site)}: an attention layer and its out_proj are wanted as PEFT spells "
                "them, X and X.base_layer.out_proj; the file is incomplete; save it again"
            )


def counted(sites: Mapping[str, Params], scale: Scale | None) -> Mapping[str, Params]:
    """The tensors of a file as they count once."""
    if scale != 2:
        return sites
    return {name: _doubled(held) if name.endswith(OUT_PROJ) else held for name, held in sites.items()}


def written(site: str, role: str, values: Tensor) -> Tensor:
    """A tensor as a file holds it."""
    return values / 2 if role in _SCALED and site.endswith(OUT_PROJ) else values


_SCALED = frozenset({"B", "b"})


def _doubled(params: Params) -> Params:
    assert isinstance(params, Stored)
    held = {info.name for role, info in params.infos.items() if role in _SCALED}
    return Stored(params.infos, lambda name: params.load(name) * 2 if name in held else params.load(name))
