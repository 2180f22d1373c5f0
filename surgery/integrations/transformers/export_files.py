"""export_checkpoint: adapters merged over a checkpoint, streaming, with an ONNX graph over the merged files.

The graph is traced from a model without weights, so that it takes no memory of theirs; it is proved where the model
fits into memory.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import nn

from surgery.core.adapter import Weighted
from surgery.errors import AbsentError, FormatError, InputError, UsageError, printable
from surgery.formats.onnx.example import Example
from surgery.formats.onnx.links import GRAPH
from surgery.formats.onnx.runtime import check
from surgery.hosts.checkpoint import Checkpoint
from surgery.hosts.packing import quantization_of
from surgery.hosts.twin import weightless
from surgery.integrations.transformers.cached import cached_example
from surgery.integrations.transformers.examples import example_for
from surgery.integrations.transformers.exporting import Pretrained, sources_of, without_weights
from surgery.integrations.transformers.loading import Wanted, base_model, class_of, read_model, transformers_package
from surgery.integrations.transformers.quiet import quiet
from surgery.integrations.transformers.whole import refuse_missing, unread
from surgery.io.hub import Located
from surgery.io.memory import available_bytes
from surgery.io.staging import Staging
from surgery.io.strict_json import read_json
from surgery.procedures.exports.export import ExportReport, Manner, names_in_files, traced, write_graph
from surgery.procedures.exports.export_readme import write_readme
from surgery.procedures.exports.kept import has_nodes, is_of_bitsandbytes, refuse_kept
from surgery.procedures.exports.proof import Claim, Proof, Reference, prove, reference_of
from surgery.procedures.exports.proof_by_layers import Files, bytes_by_layers, prove_by_layers
from surgery.procedures.live.load import LayOptions, lay
from surgery.procedures.live.save import DEFAULT
from surgery.procedures.live.switch import set_adapter
from surgery.procedures.planning.treatment import HELD_IN, Treatment
from surgery.procedures.writing.merge_checkpoint import Options, merge_checkpoint

_PROOF_BYTES = 16  # for each weight: one as it is stored, one in float64, and what running them takes


@dataclass(frozen=True)
class Export:
    """How a graph is made."""

    how: Manner
    kv: bool = False  # with a cache
    max_memory: int | None = None  # bytes that comparing it may take; None: what is free


def export_checkpoint(
    base: Checkpoint, adapters: Sequence[Weighted], out: Path, options: Options, export: Export
) -> ExportReport:
    """Merge into the new folder `out`, and write a graph over it; all of it is at its place at once, or nothing.

    Raises InputError for what has no graph, CheckError where onnxruntime computes otherwise, and as
    `merge_checkpoint` does.
    """
    if not (base.folder / "config.json").is_file():
        raise AbsentError(f"{printable(base.path)}: no config.json in it; a model of transformers is wanted")
    first = adapters[0].adapter if adapters else None
    left = unread(_built(base.folder, base.folder, first), base)  # before anything is merged
    treatment = _treatment(base, adapters, options.treatment)
    writer = _Graph(base, adapters, out, export, treatment.into not in (None, "16bit"))
    with quiet():
        merge_checkpoint(base, adapters, out, replace(options, treatment=treatment, beside=writer))
    assert writer.report is not None
    return replace(writer.report, unread=left)


def _treatment(base: Checkpoint, adapters: Sequence[Weighted], asked: Treatment) -> Treatment:
    """Codes are kept where nothing is merged into them and nothing else is asked for.

    FormatError or UsageError for codes that no graph can hold.
    """
    if asked.into is None and asked.dtype is None and not adapters and is_of_bitsandbytes(base):
        return replace(asked, into="keep")
    if asked.into == "keep":
        refuse_kept(base.packed)
    if asked.into in HELD_IN and not has_nodes(asked.into):
        raise UsageError(f"export: `into={asked.into}`, which no graph here decodes; 16bit, nf4, fp4 or int8 is wanted")
    return asked


@dataclass
class _Graph:
    """Writes the graph beside merged weights."""

    base: Checkpoint
    adapters: Sequence[Weighted]
    out: Path
    export: Export
    coded: bool  # are the merged weights held in codes?
    report: ExportReport | None = None

    def __call__(self, staging: Staging) -> Mapping[str, str]:
        first = self.adapters[0].adapter if self.adapters else None
        model, kind = _built(staging.folder, self.base.folder, first), Pretrained()
        plain = weightless(model)
        example = cached_example(plain) if self.export.kv else example_for(model)
        kind.prepare(plain.module)
        graph = traced(plain, example)
        sizes, written = write_graph(graph, plain.module, kind, staging, self.export.how)
        written |= write_readme(staging, sizes)
        proof = self._proof(model, Claim(staging.folder / GRAPH, example, kind.prepare), plain.module)
        proof.require(self.out)
        self.report = ExportReport(self.out, sizes.pop(GRAPH), sizes, proof)
        return written

    def _proof(self, model: nn.Module, claim: Claim, plain: nn.Module) -> Proof:
        """Layer by layer, or without a run, where the model does not fit into memory; so where it cannot be loaded."""
        needed = _PROOF_BYTES * sum(held.numel() for held in model.parameters())
        most = available_bytes() if self.export.max_memory is None else self.export.max_memory
        told = f"{needed:,} bytes of memory are needed for that, {most:,} may be taken" if needed > most else ""
        told = told or _unloadable(claim.graph.parent)
        if not told:
            adapted, left_out = self._adapted(type(model), claim.example)
            merged = base_model(Located(claim.graph.parent), Wanted(type(model)), None)
            return replace(prove(merged, claim, adapted).proof(), left_out=left_out)
        if bytes_by_layers(model) > most:
            check(claim.graph)
            return Proof((), f"not run against the model: {told}; {bytes_by_layers(model):,} layer by layer")
        return replace(self._by_layers(model, claim, plain), left_out=f"not with the whole model in memory: {told}")

    def _by_layers(self, model: nn.Module, claim: Claim, plain: nn.Module) -> Proof:
        with Checkpoint(claim.graph.parent) as files, Checkpoint(self.base.path) as base:
            before = self._files(plain, base) if self.adapters else None
            return prove_by_layers(model, claim, self._files(plain, files), before)

    @staticmethod
    def _files(plain: nn.Module, files: Checkpoint) -> Files:
        sources = sources_of(plain, files)
        return Files(files, names_in_files(plain, sources), sources.made)

    def _adapted(self, kind: type[nn.Module], example: Example) -> tuple[Reference | None, str]:
        """The base under its adapters, live; or why there is none to compare with."""
        if not self.adapters:
            return None, ""
        if self.coded:
            return None, "compared with the merged weights alone: the receipt tells what their codes hold of the change"
        if why := _unloadable(self.base.folder):
            return None, f"compared with the merged weights alone: {why}"
        if any(weight != 1 and (adapter.saved or adapter.biases) for adapter, weight in self.adapters):
            return None, "compared with the merged weights alone: what an adapter replaces has no weight"
        again = partial(live_model, self.base, self.adapters, kind)
        try:
            live = again()
        except InputError as error:
            return None, f"compared with the merged weights alone, for no live model takes the adapter: {error}"
        return reference_of(live, example, Pretrained().prepare, again), ""


def live_model(base: Checkpoint, adapters: Sequence[Weighted], kind: Any = None) -> nn.Module:
    """The base in memory under its adapters, all active, at their weights; each is called as its folder is.

    InputError for a base that is not whole, or that its config does not tell all of.
    """
    first = adapters[0].adapter if adapters else None
    with quiet():
        found, missing = read_model(Located(base.folder), Wanted(kind), first)
    refuse_missing(missing, adapters, base)
    unread(found, base)
    names: list[str] = []
    for adapter, weight in adapters:
        name = re.sub(r"[^\w-]", "_", Path(adapter.where).name) or DEFAULT
        names.append(name if name not in names else f"{name}_{len(names)}")
        lay(found, adapter, names[-1], how=LayOptions(weight=weight))
    if names:
        set_adapter(found, names)
    return found.eval()


def _unloadable(folder: Path) -> str:
    """Why transformers could not load the model there; nothing if it could."""
    method = quantization_of(read_json(folder / "config.json")).get("quant_method")
    return "bitsandbytes is missing" if method == "bitsandbytes" and find_spec("bitsandbytes") is None else ""


def _config(folder: Path) -> Any:
    """FormatError for one that transformers cannot read."""
    strict: Any = import_module("huggingface_hub.errors").StrictDataclassError  # what a config's fields raise
    try:
        return transformers_package().AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (strict, OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise FormatError(
            f"{printable(folder / 'config.json')}: transformers makes no config of it: {printable(error)}; a model "
            "that this version of transformers knows is wanted"
        ) from error


def _built(folder: Path, base: Path, adapter: Any) -> nn.Module:
    """The model of a folder's config, without weights."""
    transformers = transformers_package()
    config = _config(folder)
    kind = class_of(transformers, base, adapter)
    with without_weights():
        model = kind.from_config(config) if kind.__name__.startswith("Auto") else kind(config)
    model.tie_weights()
    found: nn.Module = model.eval()
    return found
