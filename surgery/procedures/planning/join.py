"""The join of an adapter to a checkpoint: names, ops and shapes agree, or it is refused."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from surgery.adapters.peft import check_finite, check_shapes
from surgery.core.adapter import Layer, Weighted, bias_layers, shape_of
from surgery.core.name_map import USUAL
from surgery.core.names import Endings, in_base, naming_between, nearest, owners, suffix_hits
from surgery.core.site import RawDtype, Site, TensorInfo
from surgery.errors import FormatError, InputError, MatchError, ShapeError, printable
from surgery.hosts.checkpoint import Checkpoint
from surgery.hosts.views import plainly
from surgery.ops.attention import attention_site
from surgery.ops.bias import bias_site
from surgery.procedures.places.experts import laid_on
from surgery.procedures.places.op_choice import OpChoice
from surgery.procedures.places.rows import refuse_missing
from surgery.procedures.places.tying import tying_of, vocabulary

EXPLAINED = 8  # of the sites that a base lacks; to find the nearest names takes time


class Whole(NamedTuple):
    """A tensor that takes the place of the base's, or is added to them."""

    info: TensorInfo  # as it stands in the output
    values: Tensor
    new: bool  # the base has none of this name and shape
    copied: bool = False  # what layers may be laid over: a copy of the resized base, or a trained bias


class Joined:
    """What one adapter lays over a checkpoint, and what was refused.

    `layers` are by tensor, each with its site; `wholes` are tensors that take the place of others: trained
    modules, and an embedding that has grown; `heads` are those of them that the base lacks.
    """

    def __init__(self, base: Checkpoint, given: Weighted, index: int, ops: Mapping[str, str]) -> None:
        self.base, self.weight, self.index = base, given.weight, index
        self.adapter, alone = laid_on(base, given.adapter)
        self.ops, self.tying = ops, tying_of(base)
        self.refusals: list[InputError] = []
        self.layers: dict[str, tuple[Site, Layer]] = {}
        self.wholes: dict[str, Whole] = {}
        known = {site.name: site for site in map(attention_site, base.sites()) if "weight" in site.tensors}
        if self.tying is not None and self.tying.separable:
            known[self.tying.head.name] = self.tying.head
        known |= {site.name: site for site in alone.values()}
        named = [in_base(name) for name in self.adapter.sites]
        usual = {name: known.get(USUAL.rename(name)) for name in named if name not in known}
        known |= {name: site for name, site in usual.items() if site is not None}
        self.naming = naming_between(named, known, base.in_memory)
        self._copies()
        self._saved()
        self.known = {name: self._as_grown(site) for name, site in known.items()}
        self._sites()
        self._rows()

    @property
    def heads(self) -> list[str]:
        """The tensors that only the adapter brings."""
        return [name for name in self.wholes if self._info(name) is None]

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
                site = there.with_op(there.op or choice.of(name))
                self._add(site, self._layer(name, site))
            except InputError as error:
                self.refusals.append(error)

    def _rows(self) -> None:
        """Rows of a head that the adapter speaks of and does not hold are those of the embedding that it is tied to."""
        tied = [] if self.tying is None else [self.tying.head.name]
        try:
            refuse_missing(self.adapter.config, [*self.adapter.sites, *tied], self.adapter.where)
        except MatchError as error:
            self.refusals.append(error)

    def _add(self, site: Site, layer: Layer) -> None:
        if site.weight.name in self.layers:
            other = self.layers[site.weight.name][1].name
            raise MatchError(
                f"{printable(layer.name)}: {printable(other)} is the base's {printable(site.weight.name)} too; "
                "one adapter of each weight is wanted; was it renamed?"
            )
        bias, on_bias = bias_site(site), bias_layers([layer])
        if bias is not None and on_bias and bias.weight.shape != site.shape[:1]:
            raise ShapeError(
                f"{printable(bias.weight.name)}: {list(bias.weight.shape)}; one for each of the {site.shape[0]} "
                "outputs is wanted; the base is damaged"
            )
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
        wanted = {role: spec.shape for role, spec in method.tensors(site).items()}
        told = suffix_hits(self.ops.keys(), name) or suffix_hits(self.ops.keys(), site.name)
        if told and any(shape_of(params, role) != shape for role, shape in wanted.items()):
            raise MatchError(
                f"{printable(name)}: {site.acting.name}, as --op says, it does not fit the adapter; leave --op out"
            )
        check_shapes(name, params, wanted, self.adapter.where)
        check_finite(name, params, self.adapter.where)
        method.refuse_merge(site)
        return Layer(method.weighted(self.weight), params, self.index, name)

    def _copies(self) -> None:
        """Copies of the base's own tensors: equal ones say nothing, grown ones take their place."""
        for name, values in self.adapter.copies.items():
            there = self._there(name)
            info = self._info(there)
            if info is not None and info.shape != tuple(values.shape) and _grown(info, values, self.base):
                self._put(name, Whole(info._replace(shape=tuple(values.shape)), values, True, copied=True))
            elif info is None or (self.base.info(there) is not None and not _equal(self.base, info, values)):
                self.refusals.append(self._unequal(name, info))
            elif self.base.info(there) is None:
                self._put(name, Whole(info, values, True, copied=True))

    def _saved(self) -> None:
        """Trained modules take the place of the base's; over a bias, a layer's own may be laid."""
        for name, values in self.adapter.saved.items():
            there, bias = self._there(name), name in self.adapter.biases
            info, shape = self._info(there), tuple(values.shape)
            if info is None and bias and self._is_shared(values):
                continue
            if info is None and not self._is_new(name):
                self.refusals.append(self._lacking(name))
            elif info is None:
                self._put(name, Whole(TensorInfo(there, values.dtype, shape), values, True))
            elif isinstance(info.dtype, RawDtype):
                self.refusals.append(
                    FormatError(
                        f"{printable(there)}: held as {info.dtype}, which modules_to_save cannot replace; "
                        "plain floats are wanted; dequantize the base first"
                    )
                )
            elif info.shape == shape or _grown(info, values, self.base):
                new = info.shape != shape or self.base.info(there) is None
                held = values.to(info.dtype) if bias else values  # as a live layer holds it while others lie over it
                self._put(name, Whole(info._replace(shape=shape), held, new, copied=bias))
            else:
                self.refusals.append(
                    ShapeError(
                        f"{printable(self.adapter.where)}: {printable(name)} is {list(shape)}, the base's is "
                        f"{list(info.shape)}; they must be equal; resize the base first"
                    )
                )

    def _put(self, name: str, whole: Whole) -> None:
        """A tensor of the adapter has its place, which no other may take."""
        there = whole.info.name
        if there in self.wholes:
            where = printable(self.adapter.where)
            self.refusals.append(
                MatchError(
                    f"{where}: {printable(name)} and another of its tensors are both {printable(there)}; one is wanted"
                )
            )
        self.wholes[there] = whole

    def _there(self, name: str) -> str:
        """A tensor's name as the base has it, or would have it."""
        renamed = self.naming.of(name)
        return renamed if self.base.info(renamed) is not None else name

    def _info(self, name: str) -> TensorInfo | None:
        """Of the base's tensor, or of the head that is tied."""
        here = self.base.info(name)
        if here is not None:
            return here
        head = None if self.tying is None else self.tying.head.weight
        return head if head is not None and head.name == name else None

    def _is_shared(self, values: Tensor) -> bool:
        """Is it one of two tied biases, of which the base's files hold the other?"""
        others = (name for name in self.adapter.biases if self._info(self._there(name)) is not None)
        return any(torch.equal(self.adapter.saved[name], values) for name in others)

    def _is_new(self, name: str) -> bool:
        """Does the tensor belong to a module of which the base has nothing, so that only the adapter brings it?"""
        ends = Endings(self.adapter.config.modules_to_save or ())
        last = {module.rpartition(".")[2] for module in owners(name) if ends.end(module)}
        return bool(last) and not any(last & set(info.name.split(".")) for info in self.base.weights())

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
        close = ", ".join(printable(other) for other in nearest(name, self.known))
        return f"{told}; nearest there: {close}; is this the adapter's base?"

    def _lacking(self, name: str) -> MatchError:
        if len(self.refusals) >= EXPLAINED:
            return MatchError(f"{printable(self.adapter.where)}: {self._trained(name)} is not in the base")
        close = ", ".join(printable(other) for other in nearest(name, [info.name for info in self.base.weights()]))
        return MatchError(
            f"{printable(self.adapter.where)}: {self._trained(name)} is not in the base; "
            f"nearest there: {close}; save the base with that module first"
        )

    def _trained(self, name: str) -> str:
        return printable(name) + ("" if name in self.adapter.biases else " of modules_to_save")

    def _unequal(self, name: str, info: TensorInfo | None) -> MatchError:
        where = printable(self.adapter.where)
        if info is None:
            return MatchError(f"{where}: it holds a copy of {printable(name)}, which the base lacks; is this its base?")
        return MatchError(
            f"{where}: its copy of {printable(name)} is not equal to the base's; "
            "it was trained or resized; name it in modules_to_save"
        )


def _grown(info: TensorInfo, values: Tensor, base: Checkpoint) -> bool:
    """Is it a tensor with a row for each token, that now has rows for other tokens too?"""
    rows = info.name in vocabulary(base) or base.info(info.name) is None
    return rows and values.dim() == len(info.shape) > 0 and tuple(values.shape[1:]) == info.shape[1:]


def _equal(base: Checkpoint, info: TensorInfo, values: Tensor) -> bool:
    if info.shape != tuple(values.shape):
        return False
    whole = plainly(base, Site(info.name, {"weight": info})).tensors["weight"]
    return bool((whole == values.to(whole.dtype)).all())
