"""The parameters of a checkpoint, and an adapter of parameters as one of the tensors that its files hold."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from itertools import permutations
from typing import NamedTuple

from torch import Tensor

from surgery.adapters.peft import check_shapes
from surgery.core.adapter import Adapter, Stored, shape_of, shapes_of
from surgery.core.method import Params
from surgery.core.name_map import USUAL
from surgery.core.names import Prefix, in_base, prefix_between
from surgery.core.op import Op
from surgery.core.site import Site, TensorInfo
from surgery.errors import MatchError, printable
from surgery.hosts.checkpoint import Checkpoint
from surgery.methods.lora_config import LoraConfig
from surgery.methods.stacks import by_expert
from surgery.ops.experts import Experts, parameter_op
from surgery.procedures.places.fused import fused
from surgery.procedures.places.parameters import ORDER, assigned, module_of, targeted
from surgery.procedures.places.piece_patterns import config_for_pieces
from surgery.procedures.places.pieces import Pieces

KEPT = 8  # tensors of an adapter at a time that are read once for all their experts


class Laid(NamedTuple):
    """An adapter, each of whose sites is a site of the base by its name, or one of `sites`."""

    adapter: Adapter
    sites: Mapping[str, Site]


def laid_on(base: Checkpoint, adapter: Adapter) -> Laid:
    """The adapter as it is for this base; what it has for parameters is for the tensors that files hold of them."""
    adapter = fused(_Stacks(base), adapter)
    config = adapter.config
    if not isinstance(config, LoraConfig) or not config.parameters():
        return Laid(adapter, {})
    return _Laying(base, adapter, config).laid()


class _Stacks:
    """The parameters of a base that are stacks of matrices, by their names in memory."""

    def __init__(self, base: Checkpoint) -> None:
        stacks = [info for info in base.weights() if len(info.shape) == 3 and not info.name.endswith(".weight")]
        names = base.names() if stacks else USUAL  # transformers' tables take a second to import
        self.shapes = {names.rename(info.name): info.shape for info in stacks}

    def reads_itself(self, name: str) -> bool:
        return name in self.shapes

    def shape(self, name: str) -> tuple[int, ...]:
        return self.shapes[name]


class _Laying:
    """The join of an adapter's tensors for parameters to a base."""

    def __init__(self, base: Checkpoint, adapter: Adapter, config: LoraConfig) -> None:
        self.adapter, self.config = adapter, config
        self.names = base.names()
        self.single: dict[str, TensorInfo] = {}  # by the name in memory
        self.pieces: dict[str, Pieces] = {}
        self.modules: dict[str, dict[str, None]] = {}  # the parameters of each
        for info in base.weights():
            name = self.names.rename(info.name)
            part = self.names.part(name)
            if part is None:
                self.single[name] = info
            else:
                self.pieces.setdefault(part.whole, Pieces(part.stack)).add(part, info)
            owner, _, own = (name if part is None else part.whole).rpartition(".")
            self.modules.setdefault(owner, {})[own] = None
        known = {*self.modules, *(site.name for site in base.sites()), *self.single}
        self.prefix = prefix_between([*{in_base(module_of(name)) for name in adapter.sites}], known) or Prefix()
        self.family = base.config.get("model_type")
        self.ops: dict[str, Op] = {}  # by the parameter, as the adapter calls it
        self.load = lru_cache(maxsize=KEPT)(lambda name, role: adapter.sites[name][role])

    def laid(self) -> Laid:
        there = assigned(self.adapter, self._held)
        sites: dict[str, Params] = {}
        found: dict[str, Site] = {}
        taken: dict[str, str] = {}  # by the names of the pieces, the parameters
        back = Prefix(self.prefix.added, self.prefix.removed)
        for name, params in self.adapter.sites.items():
            whole = self._already(name) or there.get(name)
            pieces = None if whole is None else self.pieces.get(self.prefix.of(whole))
            if whole is None:
                self._put(sites, name, params)
            elif pieces is None:
                self._put(sites, whole, params)
                found[whole] = self._single(whole)
            else:
                for info, held in self._expanded(pieces, name, self.ops[whole]):
                    piece = back.of(info.name.removesuffix(".weight"))
                    self._put(sites, piece, held)
                    taken[piece] = whole
                    found[piece] = Site(info.name.removesuffix(".weight"), {"weight": info}, Experts())
        config = config_for_pieces(self.config, taken, [name for name in found if name not in taken])
        return Laid(replace(self.adapter, config=config, sites=sites), found)

    def _put(self, sites: dict[str, Params], name: str, params: Params) -> None:
        if name in sites:
            raise MatchError(
                f"{printable(self.adapter.where)}: it has tensors for {printable(name)}, and others for a parameter of "
                "which that is a part; one of the two is wanted; was it put together from two adapters?"
            )
        sites[name] = params

    def _already(self, name: str) -> str | None:
        """Is a site named as a parameter is in memory?"""
        there = self.prefix.of(name)
        if there not in self.single and there not in self.pieces:
            return None
        self._choose_op(name, name)
        return name

    def _held(self, module: str, names: Sequence[str]) -> Sequence[str]:
        """The targeted parameters of a module, in the order that its tensors are in."""
        own = targeted(self.adapter, module, self.modules.get(self.prefix.of(module), {}))
        if len(own) != len(names):
            return own
        orders = [order for order in permutations(own) if self._fits(module, names, order)] if len(own) < 6 else []
        if len(orders) > 1:
            orders = [tuple(sorted(own, key=self._place))]
        order = orders[0] if orders else own
        for one, name in zip(order, names, strict=True):
            self._choose_op(f"{module}.{one}", name)
        return order

    def _place(self, own: str) -> int:
        """Where transformers' modules hold a parameter. MatchError where it is none of theirs."""
        if own not in ORDER or self.family is None:
            raise MatchError(
                f"{printable(self.adapter.where)}: {printable(own)} and another parameter of its module have equal "
                "shapes, and the adapter tells them apart by the module's order alone, which this base does not tell; "
                "merge it in the model, with surgery.load and surgery.merge"
            )
        return ORDER.index(own)

    def _fits(self, module: str, names: Sequence[str], order: Sequence[str]) -> bool:
        return all(self._ops(f"{module}.{own}", name) for own, name in zip(order, names, strict=True))

    def _ops(self, whole: str, name: str) -> list[Op]:
        """Those in which a site's tensors fit a parameter; pieces become one as they are, never transposed."""
        info, params = self._info(whole), self.adapter.sites[name]
        if len(info.shape) not in (2, 3):
            return []
        own, single = whole.rpartition(".")[2], self.prefix.of(whole) in self.single
        found = []
        for transposed in (False, True) if single and len(info.shape) > 2 else (False,):
            site = Site(whole, {"weight": info}, parameter_op(own, info.shape, transposed))
            specs = self.adapter.config.method(whole).tensors(site)
            if shapes_of(params) == {role: spec.shape for role, spec in specs.items()}:
                found.append(site.acting)
        return found

    def _choose_op(self, whole: str, name: str) -> None:
        found, info = self._ops(whole, name), self._info(whole)
        if len(found) > 1:
            if self.family not in TRANSPOSED_FAMILIES | STRAIGHT_FAMILIES:
                raise MatchError(
                    f"{printable(whole)}: its matrices are square, so that no shape tells whether they are stored "
                    f"transposed, nor does the family that config.json tells ({printable(self.family)}); merge it in "
                    "the model, with surgery.load and surgery.merge"
                )
            found = [op for op in found if op.swapped is (self.family in TRANSPOSED_FAMILIES)]
        own = whole.rpartition(".")[2]
        op = found[0] if found else parameter_op(own, info.shape, self.family in TRANSPOSED_FAMILIES)
        if not found and self.prefix.of(whole) in self.pieces:  # whose own tensors tell nothing of the adapter's
            specs = self.adapter.config.method(whole).tensors(Site(whole, {"weight": info}, op))
            check_shapes(whole, self.adapter.sites[name], specs, self.adapter.where)
        self.ops[whole] = op

    def _info(self, whole: str) -> TensorInfo:
        there = self.prefix.of(whole)
        return self.pieces[there].whole(there) if there in self.pieces else self.single[there]

    def _single(self, whole: str) -> Site:
        return Site(self.prefix.of(whole), {"weight": self._info(whole)}, self.ops[whole])

    def _expanded(self, pieces: Pieces, name: str, op: Op) -> Iterator[tuple[TensorInfo, Params]]:
        """The tensors of a site for each piece."""
        params = self.adapter.sites[name]
        dtypes = {role: params.infos[role].dtype if isinstance(params, Stored) else params[role].dtype for role in "AB"}
        r = shape_of(params, "A")[0] // op.stack
        for expert, rows, info in pieces.rows():
            shapes = {"A": (r, info.shape[1]), "B": (info.shape[0], r)}
            infos = {role: TensorInfo(role, dtypes[role], shapes[role]) for role in "AB"}
            cut = partial(_cut, partial(self.load, name), op, expert, rows)
            yield info, Stored(infos, cut)


TRANSPOSED_FAMILIES = frozenset({"gpt_oss", "openai_privacy_filter", "aria", "aria_text"})
"""Of transformers, those whose modules of experts say `is_transposed`."""

STRAIGHT_FAMILIES = frozenset(
    {"mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3", "olmoe", "phimoe", "glm4_moe", "jamba"}
)
"""Those whose modules of experts do not."""


def _cut(load: Callable[[str], Tensor], op: Op, expert: int, rows: slice, role: str) -> Tensor:
    """A or B for some rows of one expert's matrix."""
    values = by_expert({role: load(role) for role in "AB"}, op)[role][expert]
    return (values if role == "A" else values[rows]).contiguous()
