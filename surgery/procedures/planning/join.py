"""The join of an adapter to a checkpoint: names, ops and shapes agree, or it is refused."""

from collections.abc import Mapping, Sequence
from math import prod

from surgery.adapters.completing import completed
from surgery.adapters.peft import check_finite, check_shapes
from surgery.codecs.plain import PLAIN_DTYPES
from surgery.core.adapter import Adapter, Layer, Weighted, are_as_told, bias_layers
from surgery.core.method import Method
from surgery.core.name_map import USUAL
from surgery.core.names import in_base, naming_between, nearest, owners, suffix_hits
from surgery.core.site import Site
from surgery.errors import ConfigError, InputError, MatchError, ShapeError, printable
from surgery.hosts.checkpoint import Checkpoint
from surgery.ops.attention import attention_site
from surgery.ops.bias import bias_site
from surgery.procedures.places.experts import laid_on
from surgery.procedures.places.op_choice import OpChoice
from surgery.procedures.places.rows import refuse_missing, same_rows
from surgery.procedures.places.shared_embedding import Shared, laid_on_all, shared_in_memory, shared_of
from surgery.procedures.places.tying import tying_of, why_absent
from surgery.procedures.planning.wholes import EXPLAINED, Wholes


class Joined:
    """What one adapter lays over a checkpoint, and what was refused.

    `layers` are by tensor, each with its site; `wholes` are tensors that take the place of others; `heads` are those
    of them that the base lacks.
    """

    def __init__(self, base: Checkpoint, given: Weighted, index: int, ops: Mapping[str, str]) -> None:
        self.base, self.weight, self.index = base, given.weight, index
        self.adapter, alone = laid_on(base, given.adapter)
        self.ops, self.tying = ops, tying_of(base)
        self.layers: dict[str, tuple[Site, Layer]] = {}
        self.sites: dict[str, Site] = {}  # by the adapter's names
        known = {site.name: site for site in map(attention_site, base.sites()) if "weight" in site.tensors}
        known |= {site.name: site for site in alone.values()}
        named = [*map(in_base, self.adapter.sites), *_holding(self.adapter)]
        self.shared = shared_of(base) or shared_in_memory(base, set(named) - known.keys())
        known |= {} if self.shared is None else self.shared.sites()
        head = self._head(named, known)
        known |= {} if head is None else {head.name: head}
        usual = {name: known.get(USUAL.rename(name)) for name in named if name not in known}
        known |= {name: site for name, site in usual.items() if site is not None}
        self.naming = naming_between(named, known, base.in_memory)
        brought = Wholes(base, self.adapter, self.naming, self.tying)
        self.wholes, self.heads = brought.by_name, brought.heads
        self.refusals: list[InputError] = brought.refusals
        self.stays_tied = False  # does one layer change all that a shared embedding is?
        self.known = {name: self._as_grown(site) for name, site in known.items()}
        self._check_sizes()
        self._refuse_unplaced()
        self._sites()
        self._rows()
        self._drop_repeated()

    def _refuse_unplaced(self) -> None:
        if self.adapter.is_unplaced:
            self.refusals.append(
                MatchError(
                    f"{printable(self.adapter.where)}: it names no weight: what it holds is dealt out over a model's "
                    "modules in their order, which a checkpoint does not tell; merge it in memory, by surgery.load and "
                    "surgery.merge, or train it with save_indices=True"
                )
            )

    def _head(self, named: Sequence[str], known: Mapping[str, Site]) -> Site | None:
        """One that is tied and absent, where the adapter may mean it."""
        if self.tying is None or self.shared is not None:
            return None if self.tying is None or not self.tying.separable else self.tying.head
        asks = self.tying.separable or any(name not in known for name in named)
        return self.tying.known_head if asks else None

    def _check_sizes(self) -> None:
        """A base whose weights have other numbers of elements than those that it was trained on is another."""
        for name, (info, _) in self.adapter.trained_on.items():
            there = self.naming.of(name)
            here = self.base.info(there)
            plain = here is not None and {here.dtype, info.dtype} <= set(PLAIN_DTYPES) and there not in self.wholes
            if here is not None and plain and prod(here.shape) != prod(info.shape):
                self.refusals.append(
                    ShapeError(
                        f"{printable(self.adapter.where)}: it was trained on another base: {printable(name)} was "
                        f"{list(info.shape)} there, and here {list(here.shape)}; name that base"
                    )
                )
                return

    def _sites(self) -> None:
        found = {name: self.known.get(self.naming.of(in_base(name))) for name in self.adapter.sites}
        choice = OpChoice(
            self.base,
            self.adapter,
            {name: one for name, one in found.items() if one is not None and one.op is None},
            self.ops,
        )
        for name, there in sorted(found.items()):
            try:
                if there is None:
                    raise MatchError(self._absent(name))
                self.sites[name] = there.with_op(there.op or choice.of(name))
            except InputError as error:
                self.refusals.append(error)
        self._lay()

    def _lay(self) -> None:
        """The adapter over sites of the base, by its own names."""
        try:
            self.adapter = completed(self.adapter, self.sites)
            check_finite("what its sites share", self.adapter.shared, self.adapter.where)
        except InputError as error:
            self.refusals.append(error)
            return
        of_shared: list[tuple[Site, Layer]] = []
        for name, site in self.sites.items():
            try:
                layer = self._layer(name, site)
                if self._is_of_shared(site, layer):
                    of_shared.append((site, layer))
                else:
                    self._add(site, layer)
            except InputError as error:
                self.refusals.append(error)
        if self.shared is not None and of_shared:
            self._add_shared(self.shared, of_shared)

    def _is_of_shared(self, site: Site, layer: Layer) -> bool:
        """Does it change a shared embedding as one of the modules that this is? Single rows are replaced in all."""
        shared = self.shared is not None and self.shared.embedding.name == site.weight.name
        return shared and not layer.method.replaced_rows

    def _add_shared(self, shared: Shared, laid: Sequence[tuple[Site, Layer]]) -> None:
        try:
            self._add(*laid_on_all(shared, laid, self.adapter.where))
            self.stays_tied = True
        except MatchError as error:
            self.refusals.append(error)

    def _rows(self) -> None:
        """Rows of a head that the adapter speaks of and does not hold are those of the embedding that it is tied to."""
        tied = [] if self.tying is None or not self.adapter.config.rows() else [self.tying.head.name]
        try:
            refuse_missing(self.adapter.config, [*self.adapter.sites, *tied], self.adapter.where)
        except MatchError as error:
            self.refusals.append(error)

    def _drop_repeated(self) -> None:
        """Rows that the files of PEFT's TRAINABLE_TOKENS hold of a tied head too change once, with its embedding."""
        if self.tying is None or not self.adapter.config.repeats_rows:
            return
        head, embedding = (self.layers.get(one.name) for one in (self.tying.head.weight, self.tying.embedding))
        if head is None or embedding is None or not head[1].method.replaced_rows:
            return
        (site, layer), other = head, embedding[1]
        if same_rows((site, layer.method, layer.params), other.method, other.params):
            del self.layers[site.weight.name]

    def _add(self, site: Site, layer: Layer) -> None:
        bias, on_bias = bias_site(site), bias_layers([layer], site)
        first = site.weight if bias is None or not layer.method.leaves_weight else bias.weight
        if first.name in self.layers:
            other = self.layers[first.name][1].name
            raise MatchError(
                f"{printable(layer.name)}: {printable(other)} is the base's {printable(first.name)} too; "
                "one adapter of each weight is wanted; was it renamed?"
            )
        if bias is not None and on_bias and bias.weight.shape != site.shape[:1]:
            raise ShapeError(
                f"{printable(bias.weight.name)}: {list(bias.weight.shape)}; one for each of the {site.shape[0]} "
                "outputs is wanted; the base is damaged"
            )
        if not layer.method.leaves_weight:
            self.layers[site.weight.name] = site, layer
        if bias is not None and on_bias:
            self.layers[bias.weight.name] = bias, on_bias[0]
        if bias is not None and not self._has_trained(bias.weight.name):
            raise MatchError(
                f"{printable(self.adapter.where)}: bias is {self.adapter.config.biases()!r}, and "
                f"{printable(bias.weight.name)} is not in it; whoever wrote the file left it out; save it again, or "
                "set bias to 'none' in its config"
            )

    def _has_trained(self, bias: str) -> bool:
        """Does the adapter bring what its config says of this bias?"""
        wanted = self.adapter.config.biases() != "none" and bias.endswith(".bias")
        return not wanted or bias in self.wholes

    def _layer(self, name: str, site: Site) -> Layer:
        _ = site.weight.torch_dtype  # a format that torch lacks is refused
        method, params = self.adapter.config.method(name), self.adapter.sites[name]
        wanted = method.tensors(site)
        told = suffix_hits(self.ops.keys(), name) or suffix_hits(self.ops.keys(), site.name)
        if told and not are_as_told(params, wanted):
            raise MatchError(
                f"{printable(name)}: {site.acting.name}, as `ops` says, it does not fit the adapter; leave `ops` out"
            )
        check_shapes(name, params, wanted, self.adapter.where)
        check_finite(name, params, self.adapter.where, self.adapter.shared)
        method.check_values(params, site, self.adapter.where)
        method.refuse_merge(site)
        return Layer(self._weighted(method), params, self.index, name)

    def _weighted(self, method: Method) -> Method:
        try:
            return method.weighted(self.weight)
        except ConfigError as error:
            raise ConfigError(f"{printable(self.adapter.where)}: {error}") from error

    def _as_grown(self, site: Site) -> Site:
        tied = self.tying is not None and self.base.info(site.weight.name) is None
        whole = self.wholes.get(self.tying.embedding.name if self.tying and tied else site.weight.name)
        if whole is None:
            return site
        return Site(site.name, {**site.tensors, "weight": whole.info._replace(name=site.weight.name)}, site.op)

    def _absent(self, name: str) -> str:
        told = f"{printable(self.adapter.where)}: {printable(name)} is not in the base"
        if len(self.refusals) >= EXPLAINED:
            return told
        tied = why_absent(self.base, f"{in_base(name)}.weight")
        if tied:
            return f"{printable(self.adapter.where)}: {printable(name)}: {tied}"
        close = ", ".join(printable(other) for other in nearest(name, self.known))
        return f"{told}; nearest there: {close}; is this the adapter's base?"


def _holding(adapter: Adapter) -> Sequence[str]:
    """The modules that hold a weight, of those that an adapter targets and replaces whole."""
    held = {name.rpartition(".")[0] for name in adapter.saved if name.endswith(".weight")}
    return sorted(name for name in held if any(owner in adapter.targets for owner in (name, *owners(name))))
