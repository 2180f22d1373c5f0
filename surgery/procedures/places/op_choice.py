"""The op of a stored weight, which a file does not say: told by the caller, or by the adapter's spelling, by shapes,
by the architecture, and only then by `fan_in_fan_out`, which PEFT is known to write wrongly."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from surgery.core.adapter import Adapter, are_as_told, shapes_of
from surgery.core.names import suffix_hits
from surgery.core.op import Op
from surgery.core.site import Site
from surgery.errors import MatchError, ShapeError, printable
from surgery.hosts.checkpoint import Checkpoint
from surgery.ops import OPS
from surgery.ops.attention import Attention
from surgery.ops.convolution import Convolution
from surgery.ops.linear import LAYOUTS

# The families of transformers whose projections are stored transposed, and the names of those.
CONV1D_FAMILIES = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp", "clvp_decoder"})
CONV1D_NAMES = frozenset({"c_attn", "q_attn", "c_proj", "c_fc"})


class OpChoice:
    """For the sites of one adapter; `sites` are the base's by the adapter's names."""

    def __init__(self, base: Checkpoint, adapter: Adapter, sites: Mapping[str, Site], told: Mapping[str, str]) -> None:
        self.base, self.adapter, self.sites, self.told = base, adapter, sites, told
        self._found: dict[str, str | None] = {}  # by layout, the site that contradicts it

    def of(self, name: str) -> Op:
        """ShapeError for a weight of no op's shape; MatchError where what is known contradicts itself."""
        op, site = self._of(name), self.sites[name]
        if not op.kernel and len(site.weight.shape) != 2:
            raise ShapeError(
                f"{printable(name)}: its weight is {list(site.weight.shape)}; a matrix is wanted for {op.name}"
            )
        return op

    def _of(self, name: str) -> Op:
        site = self.sites[name]
        if not 2 <= len(site.weight.shape) <= 5:
            raise ShapeError(
                f"{printable(name)}: its weight is {list(site.weight.shape)}; a matrix or a convolution's kernel is "
                "wanted; this kind of layer is not supported yet"
            )
        for entry in suffix_hits(self.told.keys(), name) or suffix_hits(self.told.keys(), site.name):
            return OPS[self.told[entry]]
        if name in self.adapter.ops:
            return OPS[self.adapter.ops[name]]
        if site.weight.name.endswith(f".{Attention.roles['weight']}"):
            return OPS[Attention.name]
        if len(site.weight.shape) > 2:
            return self._convolution(name)
        fits = [OPS[key] for key in LAYOUTS if self._fits(name, OPS[key])]
        if len(fits) < 2:
            return fits[0] if fits else OPS["linear"]
        return self._square(name)

    def _convolution(self, name: str) -> Op:
        """In as many groups as the adapter has channels for, if not in one; the base's files tell no more than a share.

        ShapeError for a kernel of nothing.
        """
        shape = self.sites[name].weight.shape
        if 0 in shape:
            raise ShapeError(f"{printable(name)}: its weight is {list(shape)}, without an element; nothing acts so")
        found = {one[1] // shape[1] for one in shapes_of(self.adapter.sites[name]).values() if len(one) > 2}
        kernel = Convolution(kernel=shape[2:])
        chosen = (replace(kernel, groups=groups) for groups in sorted({1, *found}) if groups and shape[0] % groups == 0)
        return next((op for op in chosen if self._fits(name, op)), kernel)

    def _square(self, name: str) -> Op:
        """The layout of a square weight, which no shape tells."""
        last = self.sites[name].name.rpartition(".")[2]
        if _has_conv1d(self.base.config):
            return OPS[layout_by_name(self.base.config, last)]
        told = OPS["conv1d" if getattr(self.adapter.config, "fan_in_fan_out", False) else "linear"]
        if told.name not in self._found:
            self._found[told.name] = self._against(told)
        family = self.base.config.get("model_type") if told.name == "conv1d" else None  # no such layers are known of it
        against = self._found[told.name] or family
        if against is not None:
            raise MatchError(
                f"{printable(name)}: its weight is square, so that no shape tells its layout; fan_in_fan_out says "
                f"{told.name}, {printable(against)} does not; say which with `ops` {printable(last)}=conv1d or =linear"
            )
        return told

    def _against(self, told: Op) -> str | None:
        """A site whose shapes contradict what the config tells of all."""
        for name in self.adapter.sites:
            here = self.sites.get(name)
            if here is None or len(here.weight.shape) != 2:
                continue
            fits = [op for op in LAYOUTS if self._fits(name, OPS[op])]
            if len(fits) == 1 and fits != [told.name] and name not in self.adapter.ops:
                return name
        return None

    def _fits(self, name: str, op: Op) -> bool:
        site = self.sites[name]
        if "weight" not in site.tensors or name in self.adapter.ops:
            return name in self.adapter.ops
        try:
            specs = self.adapter.config.method(name).tensors(site.with_op(op))
        except MatchError:  # it acts on no such op, or on none of this shape
            return False
        return are_as_told(self.adapter.sites[name], specs)


def layout_by_name(config: Mapping[str, Any], name: str) -> str:
    """The layout of a module's matrix, from what is known of the architecture alone."""
    return "conv1d" if _has_conv1d(config) and name.rpartition(".")[2] in CONV1D_NAMES else "linear"


def _has_conv1d(config: Mapping[str, Any]) -> bool:
    return not CONV1D_FAMILIES.isdisjoint(families(config))


def families(config: Mapping[str, Any]) -> Iterator[str]:
    """The `model_type` of a model and of those within it."""
    if isinstance(config.get("model_type"), str):
        yield config["model_type"]
    for value in config.values():
        if isinstance(value, dict):
            yield from families(value)
