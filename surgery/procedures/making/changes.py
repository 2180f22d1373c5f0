"""Changes: what a tuned checkpoint changed, sorted into what an adapter is to hold as factors and all else."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from surgery.codecs.plain import PLAIN_DTYPES
from surgery.core.names import nearest, suffix_hits
from surgery.core.site import TensorInfo
from surgery.errors import InputError, MatchError, UsageError, printable, quoted
from surgery.hosts.checkpoint import Checkpoint
from surgery.ops.linear import LAYOUTS
from surgery.procedures.making.expert_stacks import Stack, Stacks
from surgery.procedures.making.low_rank import Truncation
from surgery.procedures.making.tuning import OwnNames, changed_modules, of_module
from surgery.procedures.places.shared_embedding import shared_of
from surgery.procedures.places.tying import tying_of

Rest = Literal["refuse", "save", "drop"]
_OPS = (*LAYOUTS, "embedding")


@dataclass(frozen=True)
class Extraction:
    """What is taken. `targets` are ends of module names, all if None; `rest` is what becomes of other changes."""

    truncation: Truncation
    targets: Sequence[str] | None = None
    rest: Rest = "refuse"
    ops: Mapping[str, str] = field(default_factory=dict)  # by the end of a module's name

    def __post_init__(self) -> None:
        if self.rest not in ("refuse", "save", "drop"):
            raise UsageError(f"`rest` is {quoted(self.rest)}; refuse, save or drop is wanted")
        for name, op in self.ops.items():
            if op not in _OPS:
                raise UsageError(f"`ops`: {quoted(op)} for {printable(name)}; one of {', '.join(_OPS)} is wanted")

    def takes(self, module: str) -> bool:
        return self.targets is None or bool(suffix_hits(self.targets, module))


class Changes(NamedTuple):
    """What changed: weights that a LoRA can stand for, by the module or the parameter in memory, and the files' others.

    `rest` are modules, as the files call them.
    """

    sites: Mapping[str, TensorInfo]
    stacks: Mapping[str, Stack]
    rest: Sequence[str]


def changes_of(base: Checkpoint, tuned: Checkpoint, extraction: Extraction, own: OwnNames) -> Changes:
    """Those to take, and the rest. InputError where there is none to take, UsageError for a target without one."""
    modules = changed_modules(base, tuned)
    stacks = _changed_stacks(base, modules, extraction, own)
    taken_tensors = {one.info.name for stack in stacks.values() for expert in stack.experts for one in expert}
    modules = {
        module: left for module, infos in modules.items() if (left := [i for i in infos if i.name not in taken_tensors])
    }
    called = {module: holder_of(own.of(infos[0].name) or infos[0].name) for module, infos in modules.items()}
    names = {*called.values(), *stacks}
    for target in extraction.targets or ():
        if not any(suffix_hits([target], name) for name in names):
            near = ", ".join(map(printable, nearest(target, names)))
            raise UsageError(f"target {quoted(target)}: no module that changed is called so; nearest are {near}")
    taken = {
        module: infos[0]
        for module, infos in modules.items()
        if extraction.takes(called[module])
        and len(infos) == 1
        and _has_matrix(infos[0])
        and own.of(infos[0].name) is not None
    }
    if not taken and not stacks:
        raise InputError(f"{printable(tuned.path)}: no matrix changed that is to be taken; a LoRA needs one")
    sites = {called[module]: info for module, info in taken.items()}
    return Changes(sites, stacks, [module for module in modules if module not in taken])


def _changed_stacks(
    base: Checkpoint, modules: Mapping[str, Sequence[TensorInfo]], extraction: Extraction, own: OwnNames
) -> dict[str, Stack]:
    """By parameter, those of which something changed and that are to be taken."""
    there = Stacks(base, own, extraction.ops)
    named = {there.name(info): info for infos in modules.values() for info in infos}
    return {name: there.of(name, info) for name, info in named.items() if name is not None and extraction.takes(name)}


def check_rest(base: Checkpoint, found: Changes, extraction: Extraction, own: OwnNames) -> None:
    """MatchError for changes that the adapter would not hold, unless they are to be dropped."""
    tying, shared = tying_of(base), shared_of(base)
    sites = {holder_of(info.name) for info in found.sites.values()}
    held = set[str]() if tying is None or tying.separable or shared is not None else sites
    held |= {*found.rest} if extraction.rest != "drop" else set()
    embedding = shared.embedding if shared is not None else tying.embedding if tying is not None else None
    if embedding is not None and holder_of(embedding.name) in held:
        others = "the output head" if shared is None else ", ".join(map(printable, shared.modules))
        raise MatchError(
            f"{printable(embedding.name)}: it is {others} too, and an adapter changes one alone; extract from "
            "checkpoints that hold them apart"
        )
    if found.rest and extraction.rest == "refuse":
        name, more = found.rest[0], len(found.rest) - 1
        raise MatchError(
            f"{printable(name)}{f' (and {more} more)' if more else ''}: it changed, and no LoRA of these targets "
            "stands for it in the model's own modules; save it whole with `rest=save`, or leave it out with "
            "`rest=drop`; of a stack of experts say how its matrices lie with `ops` NAME=linear or =conv1d"
        )
    beside = {holder_of(name) for name in found.stacks}
    for module in found.rest if extraction.rest == "save" else ():
        if module in beside:
            raise MatchError(
                f"{printable(module)}: parameters of it are adapted, so that it cannot be saved whole too; leave what "
                "else changed in it out with `rest=drop`"
            )
        if any(own.of(info.name) is None for info in of_module(base, module)):
            raise MatchError(
                f"{printable(module)}: it changed, and the model in memory calls it otherwise, or holds it in a stack; "
                "no adapter has a place for it; leave it out with `rest=drop`"
            )
    if "" in found.rest and extraction.rest == "save":
        raise MatchError("a tensor outside of any module changed; it cannot be saved whole; take `rest=drop`")


def holder_of(name: str) -> str:
    """The module that a tensor lies in."""
    return name.rpartition(".")[0]


def _has_matrix(info: TensorInfo) -> bool:
    """Or a convolution's kernel, whose matrix is [out, in]. Files do not tell its groups: they are taken for one."""
    return info.name.endswith(".weight") and 2 <= len(info.shape) <= 5 and info.dtype in PLAIN_DTYPES
