"""The op of a stored weight, which a file does not say: told by the caller, or by the adapter's spelling, by shapes,
by the architecture, and only then by `fan_in_fan_out`, which PEFT is known to write wrongly."""

from collections.abc import Mapping

from surgery.core.adapter import Adapter
from surgery.core.names import suffix_hits
from surgery.core.op import Op
from surgery.core.site import Site
from surgery.errors import MatchError, ShapeError, printable
from surgery.hosts.checkpoint import Checkpoint
from surgery.ops import OPS

# The families of transformers whose projections are stored transposed, and the names of those.
CONV1D_FAMILIES = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp", "clvp_decoder"})
CONV1D_NAMES = frozenset({"c_attn", "q_attn", "c_proj", "c_fc"})
LAYOUTS = ("linear", "conv1d")


class OpChoice:
    """For the sites of one adapter; `sites` are the base's by the adapter's names."""

    def __init__(self, base: Checkpoint, adapter: Adapter, sites: Mapping[str, Site], told: Mapping[str, str]) -> None:
        self.base, self.adapter, self.sites, self.told = base, adapter, sites, told

    def of(self, name: str) -> Op:
        """ShapeError for a weight that is no matrix; MatchError where what is known contradicts itself."""
        site = self.sites[name]
        if len(site.weight.shape) != 2:
            raise ShapeError(
                f"{printable(name)}: its weight is {list(site.weight.shape)}; a matrix is wanted; "
                "this kind of layer is not supported yet"
            )
        for entry in suffix_hits(self.told.keys(), name) or suffix_hits(self.told.keys(), site.name):
            return OPS[self.told[entry]]
        if name in self.adapter.ops:
            return OPS[self.adapter.ops[name]]
        fits = [OPS[key] for key in LAYOUTS if self._fits(name, OPS[key])]
        if len(fits) < 2:
            return fits[0] if fits else OPS["linear"]
        return self._square(name)

    def _square(self, name: str) -> Op:
        """The layout of a square weight, which no shape tells."""
        family = self.base.config.get("model_type")
        last = self.sites[name].name.rpartition(".")[2]
        told = OPS["conv1d" if getattr(self.adapter.config, "fan_in_fan_out", False) else "linear"]
        if family in CONV1D_FAMILIES:
            return OPS["conv1d" if last in CONV1D_NAMES else "linear"]
        if family is not None and told.name == "linear":
            return told
        against = family if family is not None else self._against(told)
        if against is not None:
            raise MatchError(
                f"{printable(name)}: its weight is square, so that no shape tells its layout; fan_in_fan_out says "
                f"{told.name}, {printable(against)} does not; say which with --op {printable(last)}=conv1d or =linear"
            )
        return told

    def _against(self, told: Op) -> str | None:
        """A site whose shapes contradict what the config tells of all."""
        for name, params in self.adapter.sites.items():
            site = self.sites.get(name)
            shapes = {tuple(values.shape) for values in params.values()}
            if site is not None and len(shapes) == len(params) and not self._fits(name, told):
                return name
        return None

    def _fits(self, name: str, op: Op) -> bool:
        site = self.sites[name]
        if "weight" not in site.tensors or len(site.weight.shape) != 2 or name in self.adapter.ops:
            return name in self.adapter.ops
        specs = self.adapter.config.method(name).tensors(site.with_op(op))
        return all(tuple(self.adapter.sites[name][role].shape) == spec.shape for role, spec in specs.items())
