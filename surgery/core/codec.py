"""Codec: how a weight is held as named tensors; and packed, the tensors that together hold one."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

Shape = tuple[int, ...]
Headers = Mapping[str, tuple[torch.dtype, Shape]]  # dtype and shape of each tensor, by role
Settings = Mapping[str, Any]
MADE_BY = "made_by"  # the role of what fresh codes are made by, where stored scales do not tell it; in no file


class Packed(NamedTuple):
    """The plain tensors that hold one weight, by role, as a file lists them, and the format's settings.

    With `rows`, of the weight's first axis, the tensors are cut to the spans of these rows.
    """

    tensors: Mapping[str, Tensor]
    settings: Mapping[str, Any] = {}
    rows: slice | None = None

    @property
    def headers(self) -> Headers:
        return {role: (values.dtype, tuple(values.shape)) for role, values in self.tensors.items()}


class Codec(ABC):
    """Pure: decodes packed tensors to floats and encodes floats back."""

    name: ClassVar[str]
    endings: ClassVar[Mapping[str, str]]  # by role, what the tensor's name has after that of its site
    plain_ending: ClassVar[str] = ".weight"  # the same of the one tensor that would hold the weight plainly
    stacked: ClassVar[bool] = False  # does it hold a stack [stack, in, out], the codes of each output in a row?

    @abstractmethod
    def claims(self, headers: Headers) -> bool:
        """Whether these tensors are held this way."""

    def read(self, headers: Headers, config: Settings, load: Callable[[str], Tensor]) -> Settings:  # noqa: ARG002
        """The settings of whole tensors that it claims: what `config`, the quantization_config of a model, says,
        or tensors of it that `load` gives by role. FormatError where they contradict the headers."""
        return {}

    @abstractmethod
    def shape(self, headers: Headers, settings: Settings) -> Shape:
        """Of the weight, from whole tensors."""

    def dtype(self, settings: Settings) -> torch.dtype | None:  # noqa: ARG002  # most do not tell
        """What the weight was held in before it was encoded, if that is told."""
        return None

    @abstractmethod
    def spans(self, headers: Headers, settings: Settings, rows: slice) -> Mapping[str, slice]:
        """By role, which rows of the tensor's first axis are needed for `rows` of the weight; no others are cut."""

    def step(self, headers: Headers, settings: Settings) -> int:  # noqa: ARG002  # most share nothing
        """A number of rows of the weight that share no element of `endings`' first role with the rows after them."""
        return 1

    @abstractmethod
    def decode(self, packed: Packed, dtype: torch.dtype) -> Tensor:
        """The stored weight, or the packed rows of it, in `dtype`, always in fresh memory."""

    @abstractmethod
    def encode(self, weight: Tensor, like: Packed) -> Packed:
        """`weight` held as `like` is: by its scales, and by its codes where the value is unchanged.

        encode(decode(p), like=p) == p in bytes. Float64 is rounded once. `weight` holds finite numbers where `like`
        does.
        """

    @abstractmethod
    def fresh(self, weight: Tensor, settings: Settings) -> Packed:
        """A whole weight held this way with scales of its own. ConfigError for settings that cannot be."""

    def told(self, settings: Settings, dtype: torch.dtype, plainly: Sequence[str]) -> Settings | None:  # noqa: ARG002
        """What config.json says of a model whose linear layers, but those of `plainly`, are `fresh(.., settings)`.

        As transformers writes it, of one that computes in `dtype`; None where no such model is made here.
        """
        return None

    def metadata(self, weights: Mapping[str, tuple[Shape, torch.dtype]]) -> Mapping[str, str]:  # noqa: ARG002
        """What the headers of files say of fresh weights, by name, each of a shape and made in a dtype.

        Most loaders ask for nothing there.
        """
        return {}

    @abstractmethod
    def grid(self, packed: Packed) -> tuple[Tensor, Tensor]:
        """For each element the next values below and above that it could hold, in float64; at the ends its own."""


class TiledCodec(Codec):
    """One that makes fresh weights some rows at a time, so that no whole weight has to be in memory."""

    made_in: ClassVar[torch.dtype | None] = None  # what fresh codes are made from, whatever the weight's own dtype

    @abstractmethod
    def scales(self, tiles: Iterable[Tensor], shape: Shape, dtype: torch.dtype, settings: Settings) -> Packed:
        """All that holds a weight of this shape and dtype, given by its rows in order, but for the codes.

        These are on the meta device. ConfigError for settings, or a shape, that cannot be.
        """

    @abstractmethod
    def coded(self, weight: Tensor, by: Packed) -> Packed:
        """Rows of that weight, with fresh codes by its scales; `by` is cut to these rows, a multiple of `step`."""

    def fresh(self, weight: Tensor, settings: Settings) -> Packed:
        scales = self.scales([weight], tuple(weight.shape), weight.dtype, settings)
        return as_stored(self.coded(weight, scales))


def as_stored(packed: Packed) -> Packed:
    """Without what no file holds."""
    return packed._replace(tensors={role: one for role, one in packed.tensors.items() if role != MADE_BY})


def on_meta(shape: Shape, dtype: torch.dtype) -> Tensor:
    """What stands for codes that are not made yet: their shape and dtype, and no memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def differs(weight: Tensor, held: Tensor) -> Tensor:
    """Where two weights of one dtype have other values; the two zeros are one, and so are NaNs."""
    return (weight != held) & ~(weight.isnan() & held.isnan())
