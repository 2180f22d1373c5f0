"""extract: what a tuned checkpoint has over its base, as a LoRA adapter of low rank, site by site."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from surgery.adapters.peft import CONFIG, config_bytes
from surgery.adapters.spill import Spill
from surgery.codecs.plain import PLAIN_DTYPES
from surgery.core.names import nearest, suffix_hits
from surgery.core.op import Op
from surgery.core.site import Site, TensorInfo
from surgery.errors import InputError, MatchError, UsageError, printable, quoted
from surgery.hosts.checkpoint import Checkpoint
from surgery.hosts.reading import Reading
from surgery.io.fingerprint import BASE_PRINT, Hashed, base_print_bytes
from surgery.io.place import refuse_overlap
from surgery.io.staging import Staging
from surgery.ops import OPS
from surgery.ops.convolution import Convolution
from surgery.ops.linear import LAYOUTS
from surgery.procedures.making.expert_stacks import Stack, Stacks
from surgery.procedures.making.factored import Pair, factored, factored_stack
from surgery.procedures.making.fidelity import Fidelity, FidelityReport
from surgery.procedures.making.low_rank import Truncation
from surgery.procedures.making.ranked_config import ranked_config
from surgery.procedures.making.tuning import OwnNames, changed_modules, check_alike, of_module, whole
from surgery.procedures.places.op_choice import layout_by_name
from surgery.procedures.places.parameters import spelled_without_model
from surgery.procedures.places.shared_embedding import Shared, shared_of
from surgery.procedures.places.tying import is_embedding, tying_of

Rest = Literal["refuse", "save", "drop"]
_OPS = (*LAYOUTS, "embedding")


@dataclass(frozen=True, repr=False)
class ExtractReport(FidelityReport):
    """What was written, and how far it is from the tuned weights: `relative_error` in all, `sites` one by one.

    `saved` are the modules that are in it whole, `dropped` those whose changes it has not.
    """

    saved: Sequence[str] = field(default=())  # modules that are in the adapter whole
    dropped: Sequence[str] = field(default=())  # modules that changed and are left out

    title = "surgery extract"

    @property
    def reproducible(self) -> bool:
        return False  # LAPACK's bits differ from machine to machine

    def summary(self) -> str:
        """One line."""
        more = [(self.saved, "saved whole"), (self.dropped, "left out though changed")]
        return super().summary() + "".join(f", {len(names)} modules {what}" for names, what in more if names)

    def to_json(self) -> dict[str, Any]:
        return super().to_json() | {"saved": list(self.saved), "dropped": list(self.dropped)}


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


class _Sorted(NamedTuple):
    """What changed: weights that a LoRA can stand for, by the module or the parameter in memory, and the files' others.

    `rest` are modules, as the files call them.
    """

    sites: Mapping[str, TensorInfo]
    stacks: Mapping[str, Stack]
    rest: Sequence[str]


def extract(
    base: Checkpoint, tuned: Checkpoint, out: Path, extraction: Extraction, *, overwrite: bool = False
) -> ExtractReport:
    """Write `tuned` - `base` as an adapter to the new folder `out`; whole, or `out` stays as it is.

    InputError for checkpoints of other names or shapes, and for changes that no LoRA stands for.
    """
    refuse_overlap(out, [base.path, tuned.path])
    check_alike(base, tuned)
    readings = base.hash_reads()
    own = OwnNames(base)
    found = _sorted_out(base, tuned, extraction, own)
    _check_rest(base, found, extraction, own)
    spelled = spelled_without_model(found.stacks)
    ops = {name: _op(base, name, info, extraction.ops) for name, info in found.sites.items()}
    whole_ones = [info for module in sorted(found.rest) for info in of_module(tuned, module)]
    saved = {own.of(info.name) or info.name: info for info in whole_ones} if extraction.rest == "save" else {}
    modules = sorted({_module(name) for name in saved})
    shared = shared_of(base)
    pair, sites = Pair(base, tuned), dict[str, Fidelity]()
    tied_ranks: dict[str, int] = {}
    with Staging(out, overwrite=overwrite) as staging, Spill(staging) as spill:
        for name, info in found.sites.items():
            site = Site(name, {"weight": info}, ops[name])
            heads = _tied_to(base, shared, info)
            sites[name] = factored(pair, [site, *heads], extraction.truncation, spill)
            tied_ranks |= {one.name: sites[name].r for one in heads}
        for name, stack in found.stacks.items():
            sites[name] = factored_stack(pair, stack, spelled[name], extraction.truncation, spill)
        for name, info in saved.items():
            spill.add(name, whole(tuned, info))
        base.check_unchanged()
        tuned.check_unchanged()
        spill.write()
        staging.write(BASE_PRINT, base_print_bytes(_trained_on(base, readings, found)))
        config = ranked_config(
            {name: one.r for name, one in sites.items()} | tied_ranks,
            found.stacks,
            modules_to_save=modules or None,
            ensure_weight_tying=bool(tied_ranks),
            fan_in_fan_out=any(op.name == "conv1d" for op in ops.values()),
            base_model_name_or_path=base.hub_id or str(base.path),
            revision=base.commit,
        )
        staging.write(CONFIG, config_bytes(config))
    return ExtractReport(out, "low rank", sites, modules, sorted(found.rest) if extraction.rest == "drop" else [])


def _sorted_out(base: Checkpoint, tuned: Checkpoint, extraction: Extraction, own: OwnNames) -> _Sorted:
    """InputError where nothing changed, UsageError for a target that hits no change."""
    modules = changed_modules(base, tuned)
    stacks = _changed_stacks(base, modules, extraction, own)
    taken_tensors = {one.info.name for stack in stacks.values() for expert in stack.experts for one in expert}
    modules = {
        module: left for module, infos in modules.items() if (left := [i for i in infos if i.name not in taken_tensors])
    }
    called = {module: _module(own.of(infos[0].name) or infos[0].name) for module, infos in modules.items()}
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
    return _Sorted(sites, stacks, [module for module in modules if module not in taken])


def _changed_stacks(
    base: Checkpoint, modules: Mapping[str, Sequence[TensorInfo]], extraction: Extraction, own: OwnNames
) -> dict[str, Stack]:
    """By parameter, those of which something changed and that are to be taken."""
    there = Stacks(base, own, extraction.ops)
    named = {there.name(info): info for infos in modules.values() for info in infos}
    return {name: there.of(name, info) for name, info in named.items() if name is not None and extraction.takes(name)}


def _check_rest(base: Checkpoint, found: _Sorted, extraction: Extraction, own: OwnNames) -> None:
    """MatchError for changes that the adapter would not hold, unless they are to be dropped."""
    tying, shared = tying_of(base), shared_of(base)
    sites = {_module(info.name) for info in found.sites.values()}
    held = set[str]() if tying is None or tying.separable or shared is not None else sites
    held |= {*found.rest} if extraction.rest != "drop" else set()
    embedding = shared.embedding if shared is not None else tying.embedding if tying is not None else None
    if embedding is not None and _module(embedding.name) in held:
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
    beside = {_module(name) for name in found.stacks}
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


def _trained_on(base: Checkpoint, readings: Sequence[Reading], found: _Sorted) -> Hashed:
    """The base's tensors under the adapter, by their names in memory, with their sha256."""
    named = {f"{name}.weight": info for name, info in found.sites.items()}
    named |= {name: info for stack in found.stacks.values() for name, info in stack.infos().items()}
    digests = {info.name: readings[base.file_of(info.name)].tensors[info.name] for info in named.values()}
    return {name: (info._replace(name=name), digests[info.name]) for name, info in named.items()}


def _tied_to(base: Checkpoint, shared: Shared | None, info: TensorInfo) -> list[Site]:
    """The sites of other modules that a weight is too: the output head that is tied, or all that an embedding is."""
    tying = tying_of(base)
    head = "" if tying is None or tying.embedding.name != info.name else tying.head.name
    names = shared.modules if shared is not None and shared.embedding.name == info.name else [head] if head else []
    return [Site(name, {"weight": info}, OPS["linear" if name == head else "embedding"]) for name in names]


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _op(base: Checkpoint, name: str, info: TensorInfo, told: Mapping[str, str]) -> Op:
    for entry in suffix_hits(told.keys(), name):
        return OPS[told[entry]]
    if len(info.shape) > 2:
        return Convolution(kernel=info.shape[2:])
    last = name.rpartition(".")[2]
    if is_embedding(info.name) or last in _EMBEDDINGS:
        return OPS["embedding"]
    if not _UNSURE.isdisjoint(last.split("_")):
        raise MatchError(
            f"{printable(name)}: its name does not tell whether rows of it are looked up; say which with "
            f"`ops` {printable(last)}=embedding or =linear"
        )
    return OPS[layout_by_name(base.config, name)]


_EMBEDDINGS = frozenset({"wpe", "position_embeddings", "token_type_embeddings"})  # others that are in many models
_UNSURE = frozenset({"embed", "embedding", "embeddings", "bias"})  # words in names of embeddings, and of linear maps


def _has_matrix(info: TensorInfo) -> bool:
    """Or a convolution's kernel, whose matrix is [out, in]. Files do not tell its groups: they are taken for one."""
    return info.name.endswith(".weight") and 2 <= len(info.shape) <= 5 and info.dtype in PLAIN_DTYPES
