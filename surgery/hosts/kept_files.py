"""KeptFiles: what becomes of layers that were decoded as they were loaded, where a merge keeps their files' codes."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from surgery.codecs import codec_of
from surgery.core.codec import Packed
from surgery.core.op import Op
from surgery.core.site import Site, TensorInfo
from surgery.errors import MatchError, printable
from surgery.hosts.checkpoint import Checkpoint
from surgery.hosts.holding import Kept, refuse_unheld
from surgery.hosts.model import stored_weight
from surgery.hosts.quantized import is_quantized
from surgery.layers.aware import Holding

_HALVES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Aside:
    """Scales and codes stay as the files have them; the layer holds what they decode to."""

    where: str  # which files, and which weight of theirs
    op: Op
    packed: Packed = field(compare=False, repr=False)
    moved: dict[torch.device, Packed] = field(default_factory=dict, compare=False, repr=False)

    def begin(self, base_layer: nn.Module) -> Tensor:
        packed = self._beside(base_layer)
        return codec_of(packed, self.where).decode(packed, torch.float64)

    def end(self, base_layer: nn.Module, laid: Tensor) -> Tensor:
        packed = self._beside(base_layer)
        return self._read(codec_of(packed, self.where).encode(laid, like=packed), base_layer)

    def decoded(self, base_layer: nn.Module) -> Tensor:
        """What the files hold, in the layer's dtype."""
        return self._read(self._beside(base_layer), base_layer)

    def _read(self, packed: Packed, base_layer: nn.Module) -> Tensor:
        """As a loader does it: to what the codec tells, or the scales are in, and then to the layer's dtype."""
        codec, dtype = codec_of(packed, self.where), stored_weight(base_layer, self.op).dtype
        scales = packed.tensors.get("weight_scale")
        told = scales.dtype if scales is not None and scales.dtype in _HALVES else dtype
        return codec.decode(packed, codec.dtype(packed.settings) or told).to(dtype)

    def _beside(self, base_layer: nn.Module) -> Packed:
        device = stored_weight(base_layer, self.op).device
        if device not in self.moved:
            tensors = {role: one.to(device) for role, one in self.packed.tensors.items()}
            self.moved.clear()
            self.moved[device] = self.packed._replace(tensors=tensors)
        return self.moved[device]


class KeptFiles:
    """By layer; None where its files hold it plainly. `opened` gives the files of a model, once one is looked for."""

    def __init__(self, opened: Callable[[], Checkpoint]) -> None:
        self.opened = opened
        self.aside = False  # are there layers whose codes stay beside them?

    def __call__(self, base_layer: nn.Module, op: Op, where: str) -> Holding | None:
        """MatchError for a weight that is not the one of the files, or that they do not name."""
        if is_quantized(base_layer):
            return refuse_unheld(Kept(), base_layer, where)
        files, held = self._files, self._held.get(f"{where}.weight")
        if held is None:
            self._require_named(f"{where}.weight")
            return None
        found = Aside(f"{printable(files.path)}: {printable(held.name)}", op, files.load(Site("", {"weight": held})))
        if not torch.equal(found.decoded(base_layer), stored_weight(base_layer, op)):
            raise MatchError(
                f"{printable(where)}: its weight is not what {printable(files.path)} decodes to, whose codes a merge "
                "would keep; load the model from there anew"
            )
        self.aside = True
        return refuse_unheld(found, base_layer, where)

    def _require_named(self, name: str) -> None:
        """What no one names could be held in any way."""
        if name not in self._named and name not in self._files.ties():
            raise MatchError(
                f"{printable(name)}: {printable(self._files.path)}, whose codes a merge would keep, holds nothing that "
                "is called so; load the model from there by its own class, exclude the module, or give a format"
            )

    @cached_property
    def _files(self) -> Checkpoint:
        return self.opened()

    @cached_property
    def _held(self) -> Mapping[str, TensorInfo]:
        """By what a model in memory calls each weight."""
        called = self._files.called()
        return {called(name): held.plain for name, held in self._files.packed.items()}

    @cached_property
    def _named(self) -> Collection[str]:
        called = self._files.called()
        return {called(info.name) for info in self._files.weights()}
