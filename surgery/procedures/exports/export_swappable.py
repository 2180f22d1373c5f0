"""export_swappable: a model's base with slots, and each of its adapters as a file that onnxruntime puts into them."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from surgery.errors import MatchError, StateError, printable
from surgery.formats.onnx.example import Example
from surgery.formats.onnx.links import GRAPH
from surgery.formats.onnx.runtime import run
from surgery.formats.onnx.slots import Slot, default_to_nothing, slot_of, with_slots, write_adapter
from surgery.hosts.checkpoint import Checkpoint
from surgery.hosts.tree import adapted_layers, injected, refuse_merged, replaced_modules
from surgery.hosts.twin import weightless
from surgery.io.staging import Staging
from surgery.io.weight_files import INDEX
from surgery.layers import Adapted
from surgery.procedures.exports.export import ExportReport, Kind, Manner, Sources, State, traced, write_graph
from surgery.procedures.exports.export_readme import write_readme
from surgery.procedures.exports.proof import Claim, Proof, prove, reference_of, trials_of
from surgery.procedures.live.merged_state import plain_state
from surgery.procedures.live.switch import set_adapter
from surgery.procedures.places.stacking import stack_of

_INSTEAD = "export it merged"
_FILE = re.compile(r"[\w.-]+")


class Carrying:
    """A Kind, with small files beside the weights, such as a tokenizer; those that it writes itself win."""

    def __init__(self, kind: Kind, files: Mapping[str, Path | bytes]) -> None:
        self.kind, self.files = kind, files

    def prepare(self, twin: nn.Module) -> None:
        self.kind.prepare(twin)

    def write(self, root: nn.Module, staging: Staging, state: State) -> None:
        self.kind.write(root, staging, state)
        for name, content in self.files.items():
            # The index is left out, for the weights may be cut otherwise than the base's.
            if name != INDEX and not os.path.lexists(staging.folder / name):
                staging.put(name, content)

    def sources(self, twin: nn.Module, files: Checkpoint) -> Sources:
        return self.kind.sources(twin, files)


def export_swappable(root: nn.Module, example: Example, out: Path, kind: Kind, how: Manner) -> ExportReport:
    """Write the base to the new folder `out`, a graph over it with a slot for each adapted layer, and NAME.onnx_adapter
    for each adapter of the model.

    Raises MatchError for adapters that no slot can hold, and as
    `export_model` does.
    """
    slots = _slots(root, how.names)
    plain = weightless(root)
    kind.prepare(plain.module)
    graph = traced(plain, with_slots(plain.module, slots, example))
    default_to_nothing(graph, slots)
    with Staging(out, overwrite=how.overwrite) as staging:
        kind.write(root, staging, plain_state(root))
        sizes, _ = write_graph(graph, plain.module, kind, staging, how)
        proof = prove(root, Claim(staging.folder / GRAPH, example, kind.prepare), None).proof()
        trials = list(proof.trials)
        for adapter in injected(root).configs:
            path = staging.folder / f"{adapter}.onnx_adapter"
            write_adapter(path, _factors(root, adapter, slots))
            with set_adapter(root, adapter):
                reference = reference_of(root, example, kind.prepare)
            assert reference is not None
            inputs = example.trials()
            trials += trials_of(inputs, run(staging.folder / GRAPH, inputs, path), reference, adapter)
        write_readme(staging, sizes, list(injected(root).configs))
        staging.adopt()
        proof = Proof(trials)
        proof.require(out)
    return ExportReport(out, sizes.pop(GRAPH), sizes, proof)


def _slots(root: nn.Module, names: str) -> list[Slot]:
    """One for each adapted layer. MatchError for what no slot can hold."""
    configs = injected(root).configs
    refuse_merged(root, "export slots")
    for adapter in configs:
        if not _FILE.fullmatch(adapter):
            raise StateError(f"adapter {printable(adapter)!r} is no name of a file; load it under another")
    if stack_of(root) is not None:
        raise MatchError("layer_replication: its layers share weights, which are exported once; run it in PyTorch")
    for adapter in injected(root).biases:
        raise MatchError(f"adapter {printable(adapter)!r}: it trains biases, which no slot can hold; {_INSTEAD}")
    for path in replaced_modules(root):
        raise MatchError(f"{printable(path)}: a module of modules_to_save, which no slot can hold; {_INSTEAD}")
    return [_slot(path, layer, names) for path, layer in adapted_layers(root).items()]


def _slot(path: str, layer: Adapted, names: str) -> Slot:
    for adapter, one in layer.fitted.items():
        if one.method.factors(one.params) is None:
            raise MatchError(
                f"{printable(path)}: adapter {printable(adapter)!r} is {one.method.name} there; a slot "
                f"holds what is added as a product of two factors, and nothing else; {_INSTEAD}"
            )
    if layer.op.name not in ("linear", "conv1d") or layer.op.roles:
        raise MatchError(f"{printable(path)}: its op is {layer.op.name}; slots lie over linear layers; {_INSTEAD}")
    outputs, inputs = layer.site.shape
    return slot_of(path, (inputs, outputs), names)


def _factors(root: nn.Module, adapter: str, slots: Sequence[Slot]) -> Mapping[str, Tensor]:
    """[in, r] and [r, out], by the slots' names."""
    layers, found = adapted_layers(root), {}
    for slot in slots:
        one = layers[slot.layer].fitted.get(adapter)
        if one is not None:
            factors = one.method.factors({role: values.detach().cpu().float() for role, values in one.params.items()})
            assert factors is not None
            found[slot.b], found[slot.a] = (values.T for values in factors)
    return found
