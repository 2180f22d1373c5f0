"""Whatever the tree: inject, run, merge, unmerge, eject leave the very modules, flags, keys and bits."""

import re
from collections.abc import Iterator

import torch
from checkpoint_folders import SPECIAL, tensor_hashes
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import surgery

NAMES = ("0", "10", "q_proj", "lin_2", "_x", "a1_b", "base_layer", "lora_A", "default", "modules_to_save")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@st.composite
def leaves(draw: st.DrawFn) -> nn.Module:
    wide, high = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    made = {"linear": nn.Linear, "conv1d": Conv1D, "embedding": nn.Embedding}
    kind = draw(st.sampled_from(sorted(made)))
    module = made[kind](high, wide)
    torch.manual_seed(draw(st.integers(0, 99)))
    for parameter in module.parameters():
        nn.init.normal_(parameter)
        parameter.requires_grad_(draw(st.booleans()))
    with torch.no_grad():
        flat = module.weight.view(-1)
        special = draw(st.permutations(SPECIAL))[: flat.numel()]
        flat[: len(special)] = torch.tensor(special)
        flat[0] *= 0  # a zero of either sign: the smallest delta shows there
    return module.to(draw(st.sampled_from(DTYPES)))


@st.composite
def trees(draw: st.DrawFn, depth: int = 3) -> nn.Module:
    root = draw(st.sampled_from((nn.Module, nn.ModuleDict)))()
    for name in draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=3, unique=True)):
        deeper = depth > 1 and draw(st.booleans())
        root.add_module(name, draw(trees(depth - 1) if deeper else leaves()))
    return root


@st.composite
def tangled(draw: st.DrawFn) -> nn.Module:
    """A tree with some modules, leaves or containers, at several paths; never inside themselves."""
    root = draw(trees())
    for _ in range(draw(st.integers(0, 3))):
        modules = [module for name, module in root.named_modules() if name]
        shared = draw(st.sampled_from(modules))
        hosts = [one for one in root.modules() if not _is_leaf(one) and one not in set(shared.modules())]
        host = draw(st.sampled_from(hosts))
        free = [name for name in NAMES if name not in host._modules]
        if free:
            host.add_module(draw(st.sampled_from(free)), shared)
    return root


@st.composite
def lora(draw: st.DrawFn, chosen: list[str]) -> surgery.AdapterConfig:
    pattern = "|".join(map(re.escape, chosen))
    return surgery.LoraConfig(r=draw(st.integers(1, 3)), target_modules=pattern, init_lora_weights=False, lora_alpha=7)


@st.composite
def ia3(draw: st.DrawFn, chosen: list[str], first: set[str]) -> surgery.AdapterConfig:
    """Modules are fed forward by the first of their paths."""
    pattern = "|".join(map(re.escape, chosen))
    fed = pattern if first.issuperset(chosen) and draw(st.booleans()) else []
    return surgery.IA3Config(target_modules=pattern, feedforward_modules=fed, init_ia3_weights=False)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(root=tangled(), data=st.data())
def test_a_model_that_went_through_surgery_is_the_very_same_model(root: nn.Module, data: st.DataObject) -> None:
    before, bits, outputs = _everything(root), tensor_hashes(root.state_dict()), _run(root)
    paths = [name for name, module in _paths(root) if _is_leaf(module)]
    adapters = data.draw(st.lists(st.sampled_from(("default", "b_2", "0")), min_size=1, unique=True))
    scalable = [name for name in paths if not isinstance(root.get_submodule(name), nn.Embedding)]
    first = {name for name, _ in root.named_modules()}
    targeted, added_to = [], []
    for adapter in adapters:
        scales = bool(scalable) and data.draw(st.booleans())
        chosen = data.draw(st.lists(st.sampled_from(scalable if scales else paths), min_size=1, unique=True))
        targeted += chosen
        added_to += [] if scales else chosen
        surgery.inject(root, data.draw(ia3(chosen, first) if scales else lora(chosen)), adapter_name=adapter)
    surgery.set_adapter(root, adapters)
    weights = {path: root.get_submodule(path).base_layer.weight for path in targeted}
    unmerged = tensor_hashes(weights)
    _run(root)
    surgery.merge(root, undo=data.draw(st.sampled_from(("index", "copy"))))
    merged = tensor_hashes(weights)
    assert all(merged[path] != unmerged[path] for path in added_to)  # a scale leaves a zero as it is
    _run(root)
    surgery.unmerge(root)
    assert tensor_hashes(weights) == unmerged
    if data.draw(st.booleans()):
        surgery.merge(root)  # eject takes it back
    surgery.eject(root)
    assert _everything(root) == before
    assert tensor_hashes(root.state_dict()) == bits
    assert all(torch.equal(a, b) for a, b in zip(_run(root), outputs, strict=True))


def _everything(root: nn.Module) -> dict[str, object]:
    """Object identities at every path, flags, keys in their order, and what hangs on the root."""
    found: dict[str, object] = {" keys": list(root.state_dict()), " root": sorted(root.__dict__)}
    for name, module in _paths(root):
        found[name] = id(module), type(module), module.training, list(module._modules)
        for role, values in module._parameters.items():
            found[f"{name}.{role}"] = id(values), None if values is None else values.requires_grad
    return found


def _paths(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return root.named_modules(remove_duplicate=False)


def _is_leaf(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | nn.Embedding | Conv1D)


def _run(root: nn.Module) -> list[Tensor]:
    """The output of each leaf, or of what stands in its place, at each path."""
    wrapped = [name for name, module in _paths(root) if hasattr(module, "fitted")]
    found = []
    for name, module in _paths(root):
        inside = any(name.startswith(f"{path}.") for path in wrapped)
        if not inside and (name in wrapped or _is_leaf(module)):
            found.append(module(_input(getattr(module, "base_layer", module) if name in wrapped else module)))
    return found


def _input(layer: nn.Module) -> Tensor:
    if isinstance(layer, nn.Embedding):
        return torch.arange(layer.num_embeddings)
    width = layer.nx if isinstance(layer, Conv1D) else layer.in_features
    return torch.linspace(-1, 1, 2 * width).view(2, width).to(layer.weight.dtype)
