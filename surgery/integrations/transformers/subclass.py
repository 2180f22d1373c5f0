"""How a model of transformers gets the adapter methods and loses them: by a subclass of its class.

A subclass, not attributes of the model, which a shallow copy would share. It bears the class's own name, and
copies and pickles are built anew from that class, so that none of it lies in a file.
"""

from functools import cache
from typing import Any

from torch import nn

from surgery.core.sharded import gathering
from surgery.integrations.transformers.generating import Generating
from surgery.integrations.transformers.methods import LOADED, AdapterMethods
from surgery.integrations.transformers.model import is_pretrained
from surgery.integrations.transformers.peft_methods import PeftMethods


def attach(root: nn.Module) -> None:
    """Put the methods on a model of transformers; others stay as they are."""
    if not is_pretrained(root):
        return
    if not isinstance(root, AdapterMethods):
        kind: Any = type(root)
        root.__class__ = with_methods(kind)
    assert isinstance(root, AdapterMethods)
    root.tell_transformers()


def detach(root: nn.Module) -> None:
    """The model has the very class again that it had."""
    if isinstance(root, AdapterMethods):
        root.__dict__.pop(LOADED, None)
        kind: Any = type(root)
        root.__class__ = _plain(kind)


def own_class(root: nn.Module) -> type[Any]:
    """The class of a model without what surgery, and fully_shard, have put before it."""
    before: tuple[type[Any], ...] = (PeftMethods, *gathering())
    return next(kind for kind in type(root).__mro__ if not issubclass(kind, before))


@cache
def with_methods(kind: Any) -> Any:
    """The subclass, one for each class."""
    names = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
    methods = Generating if kind.can_generate() else AdapterMethods
    return type(kind.__name__, (methods, kind), names | {"__reduce_ex__": _reduce_ex})


@cache
def _plain(kind: Any) -> Any:
    """The class without the methods, also where fully_shard has put its own before it since."""
    if _has_methods(kind):
        return _without(kind)
    *before, below = kind.__bases__
    own = {name: one for name, one in vars(kind).items() if name not in ("__dict__", "__weakref__")}
    return type(kind.__name__, (*before, _plain(below)), own)


def _has_methods(kind: type) -> bool:
    return kind.__bases__[0] in (AdapterMethods, Generating)


def _without(kind: type) -> type[Any]:
    return kind.__bases__[1]


def _reduce_ex(self: AdapterMethods, protocol: Any) -> Any:
    """What copy and pickle ask for: the class itself cannot be found by its name."""
    kind = type(self)
    told = super(AdapterMethods, self).__reduce_ex__(protocol)
    return told if not _has_methods(kind) else (_empty, (_without(kind),), *told[2:])


def _empty(kind: Any) -> Any:
    """A model whose attributes are to come."""
    subclass = with_methods(kind)
    return subclass.__new__(subclass)
