"""Exports of transformers' models: what lets them be traced, and how files name what they hold."""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from surgery.core.site import TensorInfo
from surgery.errors import FormatError, printable
from surgery.hosts.checkpoint import Checkpoint
from surgery.integrations.transformers.quiet import quiet
from surgery.integrations.transformers.saving import write_merged
from surgery.integrations.transformers.subclass import detach
from surgery.io.lazy import Lazy
from surgery.io.staging import Staging
from surgery.procedures.exports.export import Sources
from surgery.procedures.exports.stored_tensors import read_tensor

_EAGER = ("t5", "mt5", "umt5", "longt5")  # torch.onnx refuses the strides that their bias has under sdpa


class Pretrained:
    """A Kind: models of transformers."""

    def prepare(self, twin: nn.Module) -> None:
        """The plain class; experts in one batched product, for which there are operators; attention likewise."""
        detach(twin)
        model: Any = twin
        if model._can_set_experts_implementation():
            model.set_experts_implementation("batched_mm")
        if model.config.model_type in _EAGER:
            model.set_attn_implementation("eager")

    def write(self, root: nn.Module, staging: Staging, state: Mapping[str, Tensor]) -> None:
        with quiet():
            write_merged(root, dict(state), staging)

    def sources(self, twin: nn.Module, files: Checkpoint) -> Sources:
        return sources_of(twin, files)


@contextmanager
def without_weights() -> Iterator[None]:
    """A model that is built meanwhile has its parameters on the meta device, and its buffers as ever."""
    from transformers.initialization import no_init_weights

    register = nn.Module.register_parameter

    def on_meta(self: nn.Module, name: str, held: nn.Parameter | None) -> None:
        meta = None if held is None else nn.Parameter(held.detach().to("meta"), requires_grad=False)
        register(self, name, meta)

    patched: Any = nn.Module
    patched.register_parameter = on_meta
    try:
        with no_init_weights():
            yield
    finally:
        patched.register_parameter = register


def sources_of(plain: nn.Module, files: Checkpoint) -> Sources:
    """Where transformers would take the model's tensors from: some it renames, some it makes of several."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    model: Any = plain
    rules = get_model_conversion_mapping(model)
    renamings = [one for one in rules if isinstance(one, WeightRenaming)]
    converters = [one for one in rules if isinstance(one, WeightConverter)]
    by_pattern = {pattern: one for one in converters for pattern in one.source_patterns}
    wanted, codes = model.state_dict(), {one for plain in files.packed for one in files.holding(plain)}
    renamed: dict[str, str] = {}
    parts: dict[str, list[tuple[str, str]]] = {}
    for name in sorted(files.at, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, wanted)
        if pattern is None:
            renamed[target] = name
        elif name in codes:
            raise FormatError(
                f"{printable(name)}: held in codes, of which transformers makes one tensor with others; export it "
                "into 16bit, or, with adapters, merge first, and export what that has written"
            )
        else:
            parts.setdefault(target, []).append((name, pattern))
    made: dict[str, Lazy] = {}
    for target, found in parts.items():
        convert = partial(_converted, model, target, by_pattern[found[0][1]], found)
        for name, values in convert(partial(_shaped, files)).items():
            info = TensorInfo(name, values.dtype, tuple(values.shape))
            made[name] = Lazy(info, partial(_one_of, convert, partial(read_tensor, files), name))
    return Sources(renamed, made)


def _converted(
    model: Any, target: str, converter: Any, found: list[tuple[str, str]], read: Callable[[str], Tensor]
) -> dict[str, Tensor]:
    """What a rule of transformers makes of these tensors, by name in the model."""
    one = copy.deepcopy(converter)
    for name, pattern in found:
        one.add_tensor(target, name, pattern, read(name))
    told = one.convert(target, model=model, config=model.config)
    return {name: values[0] if isinstance(values, list) else values for name, values in told.items()}


def _one_of(convert: Callable[..., dict[str, Tensor]], read: Callable[[str], Tensor], name: str) -> Tensor:
    return convert(read)[name]


def _shaped(files: Checkpoint, name: str) -> Tensor:
    info = files.at[name][1].info
    return torch.empty(info.shape, dtype=info.torch_dtype, device="meta")
