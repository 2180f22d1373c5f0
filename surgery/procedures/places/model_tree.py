"""Tree: a live model's modules and parameters by path, its sites, and wrappers put around them."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import accumulate
from typing import Any, NoReturn, TypeVar

from torch import nn

from surgery.core.method import Dense
from surgery.core.op import Op
from surgery.core.sharded import axes_of_processes, is_gathering, is_sharded, rest
from surgery.core.site import Site
from surgery.errors import MatchError, StateError, printable
from surgery.hosts.model import live_site, parameter_site, stored_weight
from surgery.hosts.quantized import decoder, is_quantized
from surgery.hosts.recognition import op_of, unfit
from surgery.hosts.tree import Place, places
from surgery.layers import Adapted, Replaced, base_of
from surgery.ops.linear import LAYOUTS

Wrapper = TypeVar("Wrapper", Adapted, Replaced)


class Tree:
    """The modules of a model by path, and the paths of each module."""

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        rest(root)  # else weights in shares would not look like it
        self.places = list(places(root))
        self.modules: dict[str, nn.Module] = {}
        self.alone: dict[str, Adapted] = {}  # over parameters, by their names
        self.aliases: dict[int, list[Place]] = {}
        for place in self.places:
            if isinstance(place.module, Adapted) and place.module.parameter is not None:
                self.alone[place.name] = place.module
            else:
                self.modules[place.name] = place.module
            self.aliases.setdefault(id(place.module), []).append(place)

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """As `named_parameters`, each once at its first path, from the walk that has been made."""
        seen: set[int] = set()
        for prefix, module in [("", self.root), *((place.name + ".", place.module) for place in self.places)]:
            for key, values in module._parameters.items():
                if values is not None and id(values) not in seen:
                    seen.add(id(values))
                    yield prefix + key, values

    def first_name(self, name: str) -> str:
        """The first path of the module at `name`."""
        return self.aliases[id(self.modules[name])][0].name

    def plain(self, name: str) -> nn.Module:
        """The module at `name`, without what lies over it."""
        return base_of(self.modules[name])

    def tied_to(self, name: str) -> list[str]:
        """The other modules that hold the very weight, each at its first path."""
        own = self._own(name)
        weight = own._parameters.get("weight")
        holding = [] if weight is None else self._holding[id(weight)]
        return [other for other in holding if self._own(other) is not own]

    @cached_property
    def _holding(self) -> Mapping[int, Sequence[str]]:
        """By the weight, the modules that hold it."""
        found: dict[int, list[str]] = {}
        for name in self.modules:
            weight = self._own(name)._parameters.get("weight")
            if weight is not None and self.first_name(name) == name:
                found.setdefault(id(weight), []).append(name)
        return found

    def _own(self, name: str) -> nn.Module:
        """The model's own module at `name`."""
        module = self.plain(name)
        return module.original if isinstance(module, Replaced) else module

    def held(self, name: str) -> Mapping[str, nn.Parameter | None]:
        """The parameters of the module at `name`, in its order."""
        return self.plain(name)._parameters

    def parameter_names(self) -> list[str]:
        """Of all modules but the root, which nothing can be put around."""
        return [f"{name}.{own}" for name in self.modules for own, one in self.held(name).items() if one is not None]

    def reads_itself(self, name: str) -> bool:
        """Is `name` a parameter of a module that is none of our ops, and so reads it by itself?"""
        owner, _, own = name.rpartition(".")
        held = owner in self.modules and self.held(owner).get(own) is not None
        return held and op_of(self.plain(owner)) is None

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a parameter."""
        owner, _, own = name.rpartition(".")
        values = self.held(owner)[own]
        assert values is not None
        return tuple(values.shape)

    def parameter_site(self, name: str) -> Site:
        """The site of one parameter. MatchError for one that cannot be adapted by itself."""
        owner, _, own = name.rpartition(".")
        if isinstance(self.modules[owner], Adapted):
            raise MatchError(f"{printable(name)}: {printable(owner)} is adapted as a whole; name the one or the other")
        if _is_shared(self.modules[owner]):
            _refuse_share(name, "which its module reads by itself")
        return parameter_site(f"{self.first_name(owner)}.{own}", self.modules[owner])

    def layer(self, name: str, site: Site) -> Adapted:
        """The wrapper at a site, put there if there is none."""
        if not site.acting.alone:
            module = self.modules[name]
            return module if isinstance(module, Adapted) else wrap(self, module, Adapted(module, site, decoder(module)))
        if name not in self.alone:
            self._wrap_parameter(name, site)
        return self.alone[name]

    def _wrap_parameter(self, name: str, site: Site) -> None:
        """Within those of the module's other parameters."""
        owner, _, own = name.rpartition(".")
        module = self.modules[owner]
        wrapper, at = Adapted(module, site), self.aliases[id(module)]
        wrapper.__dict__["training"] = module.training
        for place in at:
            place.parent._modules[place.key] = wrapper
            self.alone[f"{place.name}.{own}"] = wrapper
        self.aliases[id(module)] = [Place(place.name, module, wrapper, "base_layer") for place in at]

    def is_linear(self, name: str) -> bool:
        """Is it of what "all-linear" stands for, output heads aside?"""
        op = op_of(self.plain(name))
        return op is not None and op.name in LAYOUTS

    def spelled(self, names: Iterable[str]) -> dict[str, str]:
        """What is adapted with `names`, as PEFT spells each: an attention layer has its out_proj with it."""
        found = {name: name for name in names}
        for name in list(found):
            if isinstance(self.plain(name), nn.MultiheadAttention):
                found[f"{name}.out_proj"] = f"{name}.base_layer.out_proj"
        return found

    def site(self, name: str) -> Site:
        """The site at a path. MatchError if no op of ours acts there."""
        base = self.plain(name)
        op = op_of(base)
        if op is None and isinstance(base, Replaced):
            raise MatchError(
                f"{printable(name)}: another adapter holds a copy of it, over which none can lie; exclude it, or "
                "delete that adapter first"
            )
        if op is None:
            kind = f"{type(base).__module__}.{type(base).__name__}"
            raise MatchError(
                f"{printable(name)}: a {kind}; Linear, Conv1D, Embedding, Conv1d, Conv2d, Conv3d and "
                "MultiheadAttention can be adapted; name their paths, or exclude this one"
            )
        why = unfit(base)
        if why is not None:
            raise MatchError(f"{printable(name)}: {why}, or exclude it")
        if _is_shared(base):
            self._check_share(name, base, op)
        return live_site(name, base, op)

    def _check_share(self, name: str, base: nn.Module, op: Op) -> None:
        """StateError unless an adapter can be shared out as the weight is."""
        if op.roles:
            _refuse_share(name, "which its module reads by itself")
        if is_quantized(base):
            _refuse_share(name, "which is quantized")
        above = [self.root, base, *(self.plain(one) for one in _above(name) if one in self.modules)]
        held = (values for values in base._parameters.values() if values is not None)
        if not any(map(is_gathering, above)) or any(axes_of_processes(values) > 1 for values in held):
            _refuse_share(name, "and not by fully_shard over one axis of processes")

    def dense(self, name: str) -> Dense:
        """The base's weight at a path where a site is, outside autograd."""
        base: Any = self.plain(name)
        op = self.site(name).acting
        return Dense(op.matrix(stored_weight(base, op)))


def wrap(tree: "Tree", module: nn.Module, wrapper: Wrapper) -> Wrapper:
    """Put `wrapper` at every path of `module`."""
    wrapper.__dict__["training"] = module.training
    for place in tree.aliases[id(module)]:
        place.parent._modules[place.key] = wrapper
        tree.modules[place.name] = wrapper
    tree.aliases[id(wrapper)] = tree.aliases[id(module)]
    return wrapper


def _above(name: str) -> Iterator[str]:
    """The paths of all that a module lies in, but the root."""
    yield from accumulate(name.split(".")[:-1], "{}.{}".format)


def _is_shared(module: nn.Module) -> bool:
    return any(is_sharded(values) for values in module._parameters.values() if values is not None)


def _refuse_share(name: str, why: str) -> NoReturn:
    raise StateError(
        f"{printable(name)}: each process holds a share of its weight, {why}; inject or load first, then fully_shard"
    )
