"""export: a model in memory, its active adapters merged, as safetensors with an ONNX graph over them.

One set of weights: the graph's initializers are the bytes of the safetensors files beside it. The output appears
whole, at its place, only after onnxruntime has been seen to compute what the model does.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from surgery.core.site import TensorInfo
from surgery.errors import printable
from surgery.formats.onnx.example import Example
from surgery.formats.onnx.graph import name_axes, simplify, strip
from surgery.formats.onnx.link import link, weights_of
from surgery.formats.onnx.links import DATA, GRAPH
from surgery.formats.onnx.trace import trace
from surgery.hosts.checkpoint import SINGLE, Checkpoint
from surgery.hosts.tree import adapted_layers
from surgery.hosts.twin import Weightless, aliases, weightless
from surgery.io.header import encode_header
from surgery.io.octets import octets
from surgery.io.staging import Staging
from surgery.io.tensor_file import TensorFile
from surgery.procedures.merged_state import merged_state, plain_state
from surgery.procedures.proof import Proof, prove, reference_of

State = Mapping[str, Tensor]


class Lazy(NamedTuple):
    """A tensor that is yet to be made."""

    info: TensorInfo
    load: Callable[[], Tensor]


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
class ExportReport:
    """What an export has written, and what proves it."""

    out: Path
    graph_bytes: int
    weights: Mapping[str, int]  # bytes of each file that the graph points into
    proof: Proof

    def summary(self) -> str:
        """One line."""
        size = sum(self.weights.values())
        return (
            f"{printable(self.out)}: {GRAPH} of {self.graph_bytes:,} bytes over {size:,} bytes of weights; "
            f"{self.proof.summary()}"
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "out": str(self.out),
            "graph_bytes": self.graph_bytes,
            "weights": dict(self.weights),
            "proof": self.proof.to_json(),
        }


def export_model(
    root: nn.Module, example: Example, out: Path, kind: Kind | None = None, *, overwrite: bool = False
) -> ExportReport:
    """Write the model with its active adapters merged to the new folder `out`; the model stays as it is, to the bit.

    Raises InputError for what cannot be traced, naming the module, CheckError if onnxruntime computes otherwise,
    OutputExistsError, and as `merge` does; then nothing is written.
    """
    kind = kind or AnyModule()
    plain = weightless(root)
    kind.prepare(plain.module)
    graph = traced(plain, example)
    with Staging(out, overwrite=overwrite) as staging:
        adapted = reference_of(root, example)
        with _merged(root) as state:
            kind.write(root, staging, state)
            sizes, _ = write_graph(graph, plain.module, kind, staging)
            proof = prove(root, example, staging.folder / GRAPH, kind.prepare, adapted)
        proof.require(out)
    return ExportReport(out, sizes.pop(GRAPH), sizes, proof)


def traced(plain: Weightless, example: Example) -> Any:
    """The graph, whose weights lie nowhere yet."""
    graph = trace(plain.module, plain.mode, example)
    simplify(graph, plain.module.state_dict().keys())
    name_axes(graph, example.axes)
    strip(graph)
    return graph


def write_graph(graph: Any, plain: nn.Module, kind: Kind, staging: Staging) -> tuple[dict[str, int], dict[str, str]]:
    """The graph linked to the weights in the folder; returns the size of each file of both, and sha256 of the new ones.

    Weights that are made of several lie in a file beside it, of safetensors' format; its name ends otherwise, for
    loaders take all that end in .safetensors.
    """
    import onnx_ir as ir

    with Checkpoint(staging.folder) as files:
        sources = kind.sources(plain, files)
        weights = weights_of(*files.files)
        sizes = {file.path.name: file.state.st_size for file in files.files}
        written = {DATA: write_tensors(staging, DATA, sources.made)} if sources.made else {}
    names = {
        name: (*group, *(sources.renamed[one] for one in group if one in sources.renamed))
        for name, group in aliases(plain).items()
    }
    if sources.made:
        beside = TensorFile(staging.folder / DATA)
        weights |= weights_of(beside)
        sizes[DATA] = beside.state.st_size
        beside.close()
    link(graph, weights, names)
    data = ir.to_proto(graph).SerializeToString()
    written[GRAPH] = staging.write(GRAPH, data)
    return {**sizes, GRAPH: len(data)}, written


def write_state(staging: Staging, state: State) -> None:
    """The tensors as model.safetensors, those that share their memory once."""
    first: dict[Any, str] = {}
    for name, values in state.items():
        first.setdefault((values.data_ptr(), values.shape, values.stride()) if values.numel() else name, name)
    write_tensors(staging, SINGLE, {name: _at_hand(name, state[name]) for name in first.values()})


def write_tensors(staging: Staging, file: str, tensors: Mapping[str, Lazy]) -> str:
    """A file of safetensors' format, each tensor at hand only while it is written; returns the file's sha256."""
    infos = [one.info for one in tensors.values()]
    raw = encode_header(infos, {"format": "pt"})
    sha256 = hashlib.sha256(raw)
    with staging.file(file, len(raw) + sum(info.nbytes for info in infos)) as staged:
        staged.write(raw)
        for one in tensors.values():
            values = one.load().detach().cpu().contiguous()
            sha256.update(octets(values))
            staged.write(octets(values))
    return sha256.hexdigest()


def _at_hand(name: str, values: Tensor) -> Lazy:
    return Lazy(TensorInfo(name, values.dtype, tuple(values.shape)), lambda: values)


@contextmanager
def _merged(root: nn.Module) -> Iterator[State]:
    """The state_dict with the active adapters in it."""
    if any(layer.running or layer.merged is not None for layer in adapted_layers(root).values()):
        with merged_state(root) as state:
            yield state
    else:
        yield plain_state(root)
