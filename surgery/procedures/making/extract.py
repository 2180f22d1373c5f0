"""extract: what a tuned checkpoint has over its base, as a LoRA adapter of low rank, site by site."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surgery.adapters.peft import CONFIG, config_bytes
from surgery.adapters.spill import Spill
from surgery.core.names import suffix_hits
from surgery.core.op import Op
from surgery.core.site import Site, TensorInfo
from surgery.errors import MatchError, printable
from surgery.hosts.checkpoint import Checkpoint
from surgery.hosts.reading import Reading
from surgery.io.fingerprint import BASE_PRINT, Hashed, base_print_bytes
from surgery.io.place import refuse_overlap
from surgery.io.staging import Staging
from surgery.ops import OPS
from surgery.ops.convolution import Convolution
from surgery.procedures.making.changes import Changes, Extraction, changes_of, check_rest, holder_of
from surgery.procedures.making.factored import Pair, factored, factored_stack
from surgery.procedures.making.fidelity import Fidelity, FidelityReport
from surgery.procedures.making.ranked_config import ranked_config
from surgery.procedures.making.tuning import OwnNames, check_alike, of_module, whole
from surgery.procedures.places.op_choice import layout_by_name
from surgery.procedures.places.parameters import spelled_without_model
from surgery.procedures.places.shared_embedding import Shared, shared_of
from surgery.procedures.places.tying import is_embedding, tying_of


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
    found = changes_of(base, tuned, extraction, own)
    check_rest(base, found, extraction, own)
    spelled = spelled_without_model(found.stacks)
    ops = {name: _op(base, name, info, extraction.ops) for name, info in found.sites.items()}
    whole_ones = [info for module in sorted(found.rest) for info in of_module(tuned, module)]
    saved = {own.of(info.name) or info.name: info for info in whole_ones} if extraction.rest == "save" else {}
    modules = sorted({holder_of(name) for name in saved})
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


def _trained_on(base: Checkpoint, readings: Sequence[Reading], found: Changes) -> Hashed:
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
