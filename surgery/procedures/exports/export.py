"""export: a model in memory, its active adapters merged, as safetensors with an ONNX graph over them.

One set of weights: the graph's initializers are the bytes of the safetensors files beside it. The output appears
whole, at its place, only after onnxruntime has been seen to compute what the model does.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from surgery.core.report import Report
from surgery.errors import UsageError, printable, quoted
from surgery.formats.onnx.example import Example
from surgery.formats.onnx.graph import name_axes, simplify, strip
from surgery.formats.onnx.link import link
from surgery.formats.onnx.links import DATA, GRAPH
from surgery.formats.onnx.stored import Weights, weights_of
from surgery.formats.onnx.trace import trace
from surgery.hosts.checkpoint import Checkpoint
from surgery.hosts.tree import adapted_layers, is_merged
from surgery.hosts.twin import Decoded, Weightless, aliases, exactly, weightless
from surgery.io.lazy import Lazy, write_tensors
from surgery.io.staging import Staging
from surgery.io.tensor_file import TensorFile
from surgery.procedures.exports.export_readme import write_readme
from surgery.procedures.exports.kept import kept_weights
from surgery.procedures.exports.proof import Claim, Proof, prove, reference_of
from surgery.procedures.exports.stored_tensors import read_tensor, write_state
from surgery.procedures.live.merged_state import merged_state, plain_state
from surgery.procedures.live.standing_in import as_plain, dtype_of_model

State = Mapping[str, Tensor]


class Sources(NamedTuple):
    """Where a model's tensors come from, if not from those of their own names."""

    renamed: Mapping[str, str] = MappingProxyType({})  # in the files, by name in the model
    made: Mapping[str, Lazy] = MappingProxyType({})  # of several, by name in the model


class Kind(Protocol):
    """What a family of models asks for."""

    def prepare(self, twin: nn.Module) -> None:
        """So that it can be traced."""

    def write(self, root: nn.Module, staging: Staging, state: State) -> None:
        """The weights as safetensors, and what belongs beside them."""

    def sources(self, twin: nn.Module, files: Checkpoint) -> Sources:
        """Where the tensors of the model are in the files."""


class AnyModule:
    """Its tensors under their own names in one file."""

    def prepare(self, twin: nn.Module) -> None:
        del twin

    def write(self, root: nn.Module, staging: Staging, state: State) -> None:
        del root
        write_state(staging, state)

    def sources(self, twin: nn.Module, files: Checkpoint) -> Sources:
        del twin, files
        return Sources()


@dataclass(frozen=True)
class Manner:
    """How an export is written. UsageError for a value that is none."""

    weights: str = "link"  # the graph points into the safetensors; "copy": it has a file of its own
    names: str = "hf"  # of slots; "genai": as the model builder of onnxruntime-genai
    overwrite: bool = False
    portable: bool = False  # of operators of ONNX alone

    def __post_init__(self) -> None:
        for name, known in (("weights", ("link", "copy")), ("names", ("hf", "genai"))):
            if getattr(self, name) not in known:
                raise UsageError(f"`{name}` is {quoted(getattr(self, name))}; {' or '.join(known)} is wanted")


@dataclass(frozen=True, repr=False)
class ExportReport(Report):
    """What an export has written, and in `proof` the errors of onnxruntime's outputs, or why there are none."""

    out: Path
    graph_bytes: int
    weights: Mapping[str, int]  # bytes of each file that the graph points into
    proof: Proof
    unread: Sequence[str] = ()  # tensors of the files that are of no part of the model, such as another task's head

    def summary(self) -> str:
        """One line."""
        size = sum(self.weights.values())
        unread = f"; {len(self.unread)} tensors are of no part of the model" if self.unread else ""
        return (
            f"{printable(self.out)}: {GRAPH} of {self.graph_bytes:,} bytes over {size:,} bytes of weights; "
            f"{self.proof.summary()}{unread}"
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "out": str(self.out),
            "graph_bytes": self.graph_bytes,
            "weights": dict(self.weights),
            "proof": self.proof.to_json(),
            "unread": list(self.unread),
        }


def export_model(
    root: nn.Module, example: Example, out: Path, kind: Kind | None = None, how: Manner | None = None
) -> ExportReport:
    """Write the model with its active adapters merged to the new folder `out`; the model stays as it is, to the bit.

    Raises InputError for what cannot be traced, naming the module, CheckError if onnxruntime computes otherwise,
    OutputExistsError, and as `merge` does; then nothing is written.
    """
    kind, how = kind or AnyModule(), how or Manner()
    plain = weightless(root)
    kind.prepare(plain.module)
    graph = traced(plain, example)
    with Staging(out, overwrite=how.overwrite) as staging:
        adapted = reference_of(root, example, kind.prepare)
        with _merged(root) as state:
            kind.write(root, staging, state)
            sizes, _ = write_graph(graph, plain.module, kind, staging, how)
            write_readme(staging, sizes)
            tried = prove(root, Claim(staging.folder / GRAPH, example, kind.prepare), adapted, _decoded(root))
        proof = tried.proof()
        proof.require(out)
    return ExportReport(out, sizes.pop(GRAPH), sizes, proof)


def traced(plain: Weightless, example: Example) -> Any:
    """The graph, whose weights lie nowhere yet."""
    graph = trace(plain.module, plain.mode, example)
    simplify(graph, plain.module.state_dict().keys())
    name_axes(graph, example.axes)
    strip(graph)
    return graph


def write_graph(
    graph: Any, plain: nn.Module, kind: Kind, staging: Staging, how: Manner
) -> tuple[dict[str, int], dict[str, str]]:
    """The graph linked to weights in the folder; returns the size of each file of both, and sha256 of the new ones.

    Weights that are made of several, scales that only a graph takes so, or all if they are to be copied, lie in a file
    beside it, of safetensors' format; its name ends otherwise, for loaders take all that end in .safetensors.
    """
    import onnx_ir as ir

    copied = how.weights == "copy"
    with Checkpoint(staging.folder) as files:
        sources, kept, weights = kind.sources(plain, files), kept_weights(files), weights_of(*files.files)
        sizes = {} if copied else {file.path.name: file.state.st_size for file in files.files}
        names = names_in_files(plain, sources)
        own = {**sources.made, **{one.scales: one.made for one in kept.values() if one.made is not None}}
        if copied:
            own |= _copies(files, (*_stored(names, weights), *(one.scales for one in kept.values())))
        written = {DATA: write_tensors(staging, DATA, own)} if own else {}
    if own:
        beside = TensorFile(staging.folder / DATA)
        weights = weights_of(beside) if copied else weights | weights_of(beside)
        sizes[DATA] = beside.state.st_size
        beside.close()
    link(graph, weights, names, {one.codes: one.nodes(weights.stored, how.portable) for one in kept.values()})
    data = ir.to_proto(graph).SerializeToString()
    written[GRAPH] = staging.write(GRAPH, data)
    return {**sizes, GRAPH: len(data)}, written


def names_in_files(plain: nn.Module, sources: Sources) -> dict[str, Sequence[str]]:
    """What each tensor of the model may be called in the files."""
    return {
        name: (*group, *(sources.renamed[one] for one in group if one in sources.renamed))
        for name, group in aliases(plain).items()
    }


def _stored(names: Mapping[str, Sequence[str]], weights: Weights) -> Iterator[str]:
    """What the files have of them."""
    found = (next((one for one in group if one in weights.stored), "") for group in names.values())
    yield from (name for name in found if name)


def _copies(files: Checkpoint, names: Iterable[str]) -> dict[str, Lazy]:
    """Of those that the files have."""
    return {name: Lazy(files.at[name][1].info, partial(read_tensor, files, name)) for name in names if name in files.at}


@contextmanager
def _merged(root: nn.Module) -> Iterator[State]:
    """The state_dict with the active adapters in it."""
    if _has_adapters(root):
        with merged_state(root) as state:
            yield state
    else:
        yield plain_state(root)


def _has_adapters(root: nn.Module) -> bool:
    return is_merged(root) or any(layer.running for layer in adapted_layers(root).values())


def _decoded(root: nn.Module) -> Decoded:
    """How quantized weights are written: as they are, or, where adapters are merged, all of them plainly."""
    return partial(as_plain, model_dtype=dtype_of_model(root)) if _has_adapters(root) else exactly
