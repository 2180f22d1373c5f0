"""What a config selects is what peft's own matcher selects, on random module trees and patterns."""

import re
from collections.abc import Mapping
from typing import Any

import peft
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as some
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from torch import nn
from transformers.pytorch_utils import Conv1D

import surgery
from surgery.core.names import suffixes
from surgery.core.patterns import GLOB
from surgery.core.select import pattern_value, select

PARTS = ("q", "k_proj", "proj", "layers", "h", "0", "1", "12", "experts", "qXk")
PIECES = (*PARTS, ".", r"\.", ".*", "(q|k_proj)", "q|proj", "[01]", r"\d+", "layers.1", ".+", "?", "q.k")
parts = some.sampled_from(PARTS)
names = some.lists(parts, min_size=1, max_size=5).map(".".join)
patterns = some.lists(some.sampled_from(PIECES), min_size=1, max_size=4).map("".join)
trees_of_names = some.lists(names, min_size=1, max_size=8, unique=True)
numbers = some.integers(0, 2) | some.lists(some.integers(0, 2), max_size=3)


@some.composite
def selections(draw: some.DrawFn) -> tuple[dict[str, Any], list[str]]:
    """Fields that choose modules, each as often as not, and the names of modules; most entries are ends of these."""
    tree = draw(trees_of_names)
    ends = some.sampled_from(sorted({end for name in tree for end in suffixes(name)}))
    targets = some.lists(ends, min_size=1, max_size=4) | some.lists(names, min_size=1, max_size=4) | patterns
    found: dict[str, Any] = {"target_modules": draw(targets)}
    for field, values in (("exclude_modules", targets), ("modules_to_save", some.lists(patterns, max_size=2))):
        if draw(some.booleans()):
            found[field] = draw(values)
    if isinstance(found["target_modules"], list) and draw(some.booleans()):
        found["layers_to_transform"] = draw(numbers)
        if draw(some.booleans()):
            found["layers_pattern"] = draw(patterns | parts | some.lists(patterns | parts, max_size=2))
    return found, tree


def ours(fields: Mapping[str, Any]) -> surgery.LoraConfig:
    """Skips what is refused: a pattern that is no regular expression, or that `regex` takes otherwise."""
    try:
        return surgery.LoraConfig(**fields)
    except surgery.ConfigError:
        assume(False)
        raise


def chosen_of(config: surgery.LoraConfig, tree: list[str]) -> list[str]:
    """Skips what is refused when it is first matched, where peft fails too: a pattern of a list that is none."""
    try:
        return select(config, tree, tuple)
    except surgery.ConfigError as error:
        assume("regular expression" not in str(error))
        raise


@settings(max_examples=400, deadline=None)
@given(drawn=selections())
def test_the_modules_that_a_config_selects_are_those_that_peft_selects(drawn: tuple[dict[str, Any], list[str]]) -> None:
    fields, tree = drawn
    config = ours(fields)
    theirs = peft.LoraConfig(**fields)
    try:
        wanted = [name for name in tree if check_target_module_exists(theirs, name)]
    except re.error:  # it matches with expressions that ours has no need to look at
        assume(False)
        raise
    assert chosen_of(config, tree) == wanted


LAYERED = [f"{head}{stack}.{number}.{leaf}" for head in ("", "a.", "0.", "a.1.") for stack in ("h", "layers", "1")
           for number in ("0", "1", "12") for leaf in ("q", "experts.1.q", "q.0")]  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(chosen=numbers, pattern=some.none() | patterns | parts | some.lists(patterns | parts, max_size=2))
def test_the_layers_that_a_config_chooses_are_those_of_peft(chosen: Any, pattern: Any) -> None:
    fields = {"target_modules": ["q", "0", "h.0.q"], "layers_to_transform": chosen, "layers_pattern": pattern}
    config, theirs = ours(fields), peft.LoraConfig(**fields)
    assert chosen_of(config, LAYERED) == [name for name in LAYERED if check_target_module_exists(theirs, name)]


@settings(max_examples=300, deadline=None)
@given(ranks=some.dictionaries(patterns, some.integers(1, 9), max_size=4), name=names)
def test_the_rank_and_alpha_of_a_module_are_those_of_peft(ranks: dict[str, int], name: str) -> None:
    config = ours({"target_modules": ["q"], "rank_pattern": ranks, "alpha_pattern": ranks})
    assume(not any(GLOB.fullmatch(key) for key in ranks))  # which peft takes for expressions that are none
    wanted = ranks.get(get_pattern_key(list(ranks), name), 10)
    assert pattern_value(config.rank_pattern, name, 10) == wanted
    assert pattern_value(config.alpha_pattern, name, 10.0) == wanted


LEAVES = {
    "linear": lambda: nn.Linear(2, 2),
    "conv1d": lambda: Conv1D(2, 2),
    "embedding": lambda: nn.Embedding(2, 2),
    "norm": lambda: nn.LayerNorm(2),
    "subclass": lambda: nn.modules.linear.NonDynamicallyQuantizableLinear(2, 2),
}
trees = some.recursive(
    some.sampled_from(sorted(LEAVES)),
    lambda inner: some.dictionaries(parts, inner, min_size=1, max_size=3),
    max_leaves=8,
)


def model_of(tree: Any) -> nn.Module:
    return LEAVES[tree]() if isinstance(tree, str) else nn.ModuleDict({key: model_of(one) for key, one in tree.items()})


def adapted(model: nn.Module) -> set[str]:
    ends = (".lora_A.default.weight", ".lora_embedding_A.default")
    found = (name.removesuffix(end) for name, _ in model.named_parameters() for end in ends if name.endswith(end))
    return {name.removeprefix("base_model.model.") for name in found}


@settings(max_examples=60, deadline=None)
@given(tree=some.dictionaries(parts, trees, min_size=1, max_size=3))
def test_all_linear_means_the_same_modules(tree: Any) -> None:
    """But where the whole name of one ends another module's, which peft then adapts too, or fails over."""
    model = model_of(tree)
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    assume(linear and not any(name.endswith(f".{one}") for name, _ in model.named_modules() for one in linear))
    with torch.no_grad():
        theirs = peft.get_peft_model(model_of(tree), peft.LoraConfig(target_modules="all-linear"))
    assert adapted(surgery.inject(model, surgery.LoraConfig(target_modules="all-linear"))) == adapted(theirs)
