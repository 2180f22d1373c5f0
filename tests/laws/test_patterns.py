"""Patterns of configs mean what `re` says, and end in time whatever they say."""

import copy
import json
import pickle
import re
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

import surgery
from surgery.core.patterns import ENDING, EXACT, LAYER, TRIES, Budget, PatternTable
from surgery.core.select import pattern_value
from surgery.errors import ConfigError

NAMES = [
    "q_proj",
    "model.layers.0.self_attn.q_proj",
    "model.layers.11.self_attn.q_proj",
    "model.layers.11.mlp.experts.7.down_proj",
    "model.language_model.layers.3.mlp.gate_up_proj",
    "transformer.h.0.attn.c_attn",
    "encoder.block.2.layer.1.EncDecAttention.q",
    "base.{e}.x",
    "lm_head",
    "",
    "a\n",
]
ORDINARY = [
    "q_proj",
    "layers.0.self_attn.q_proj",
    r"layers\.0\..*",
    r".*\.(q|k|v|o)_proj",
    r".*self_attn.*(q|k|v)_proj$",
    r"^model\.layers\.\d+\.self_attn\.[qkv]_proj",
    r"model\.layers\.(?:0|1|11)\.mlp\.experts\.\d{1,2}\.(gate|up|down)_proj",
    r"(?!.*language_model).*_proj",
    r".*(?<!gate_up)_proj",
    r"(?i).*ENCDECATTENTION\.(Q|K)",
    r"(?:.*\.)?(lm_head|c_attn)",
    r"[^.]+",
    r"(.+?)_proj",
    r".*{e}.*",
    r"\w+\b.*",
    r"(?P<side>q|k)_proj",
    r"(?s).*",
    r"h|layers|block",
    r"a{,2}|.*_{1}proj",
    r"\N{LATIN SMALL LETTER Q}_proj+",
    "",
]
NESTED = [
    "(a+)+$",
    "(a*)*b",
    "(a|a)*b",
    "(a|aa)+$",
    "([a-z.]+)*!",
    "(.*)*x!",
    "(?:(?:a+)+)+!",
    "(?=(a+)+!)a",
    "(a?){40}a{40}!",
]
FORKED = "(a|a)" * 60 + "!"  # without a repeat
SLOW_TO_COMPILE = [
    "(a{1000}){1000}",
    "((a{100}){100}){100}",
    "a{65535}" * 400,
    "(?:a{2,999}){2,999}",
    "(?i)" + "[\x01-\uffff]" * 700,
    "(?i:" + "[^\x01-\uffff]" * 500 + ")",
    "(" * 2000 + ")" * 2000,
    "(a|" * 900 + "b" + ")" * 900,
    "a" * 5000,
    "a{99999999999999999999}",
    "a?" * 2000,
]
LONG = "a" * 200


@contextmanager
def within(seconds: float) -> Iterator[None]:
    start = time.thread_time()
    yield
    assert time.thread_time() - start < seconds


def spans(found: object) -> object:
    return None if found is None else (found.span(), found.groups())  # type: ignore[attr-defined]


def as_re(how: Callable, pattern: str, name: str, form: str = EXACT) -> object:
    return spans(how(re.compile(form.replace("{}", pattern)), name))


@pytest.mark.parametrize("pattern", ORDINARY)
def test_an_ordinary_pattern_means_what_re_says(pattern: str) -> None:
    budget = Budget()
    for name in NAMES:
        assert spans(budget.fullmatch(pattern, name)) == as_re(re.Pattern.fullmatch, pattern, name)
        for form in (ENDING, LAYER):
            if pattern.startswith("(?"):
                continue  # a flag must come first; the error is tested below
            assert spans(budget.match(pattern, name, form)) == as_re(re.Pattern.match, pattern, name, form)


@settings(deadline=None, max_examples=2000)
@given(
    st.text(st.sampled_from(r"aab.\dw*+?{}()|[]^$,12:!-=<is&~P>"), max_size=12),
    st.text("abi.1{}\n-", max_size=8),
    st.sampled_from([EXACT, ENDING, LAYER]),
)
def test_any_pattern_means_what_re_says_or_is_refused(pattern: str, name: str, form: str) -> None:
    with warnings.catch_warnings(action="ignore"):
        try:
            wanted = as_re(re.Pattern.match, pattern, name, form)
        except (re.error, OverflowError):
            with pytest.raises(ConfigError):
                Budget().match(pattern, name, form)
            return
    try:
        found = spans(Budget().match(pattern, name, form))
    except ConfigError as error:
        assume("counts" not in str(error) and "no class" not in str(error))
        raise
    assert found == wanted


FIELDS = ["target_modules", "exclude_modules", "layers_pattern", "rank_pattern", "alpha_pattern"]
# Every pattern in one field, and in each other field some of them; all of them in `make test-all`.
ENDLESS = [
    pytest.param(field, pattern, marks=[pytest.mark.slow] if i and (i + j) % 4 else [])
    for i, field in enumerate(FIELDS)
    for j, pattern in enumerate([*NESTED, FORKED])
]


@pytest.mark.parametrize(("field", "pattern"), ENDLESS)
def test_a_pattern_that_never_ends_is_refused_in_time(field: str, pattern: str) -> None:
    model = nn.ModuleDict({f"{LONG}{i}": nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(2, 2)])}) for i in range(3)})
    fields: dict = {"target_modules": ["0"], "layers_to_transform": 0 if field == "layers_pattern" else None}
    fields[field] = {f"{pattern}x": 4} if field in ("rank_pattern", "alpha_pattern") else pattern
    with within(2):
        try:
            surgery.inject(model, surgery.LoraConfig(**fields))
        except (ConfigError, surgery.MatchError) as error:
            assert str(error).isprintable()  # noqa: PT017  # some of them end after all: then they match nothing


@pytest.mark.parametrize("pattern", SLOW_TO_COMPILE, ids=range(len(SLOW_TO_COMPILE)))
def test_a_pattern_that_takes_long_to_compile_is_refused_or_compiled_in_time(pattern: str) -> None:
    with within(2):
        try:
            surgery.LoraConfig(target_modules=pattern)
            surgery.LoraConfig(target_modules=["0"], rank_pattern={pattern: 4}).method("0")
        except ConfigError as error:
            assert str(error).isprintable()  # noqa: PT017


def test_all_patterns_of_a_config_share_one_second() -> None:
    config = surgery.LoraConfig(target_modules=["0"], rank_pattern={f"(a|aa)+$|{i}": 4 for i in range(1000)})
    with within(2), pytest.raises(ConfigError, match="more than 1 s"):
        config.method(LONG + "!")
    with within(2), pytest.raises(ConfigError, match="more than 1 s"):
        surgery.LoraConfig(target_modules=["0"], alpha_pattern={f"{i}" + "a?" * 1900: 4 for i in range(4000)})


def test_a_pattern_of_feedforward_modules_has_one_second_for_all_names() -> None:
    config = surgery.IA3Config(target_modules=["0"], feedforward_modules="(a|aa)+$")
    with within(2), pytest.raises(ConfigError, match="more than 1 s"):
        [config.method(f"{LONG}{i}!") for i in range(10_000)]


def test_many_plain_names_are_bounded_too() -> None:
    table = PatternTable({f"layers.{i}.q_proj": i for i in range(1000)})
    assert [pattern_value(table, f"model.layers.{i}.q_proj", -1) for i in range(1001)] == [*range(1000), -1]
    table.budget.tries = TRIES // 1000
    with pytest.raises(ConfigError, match="too many patterns"):
        [table.key_of(f"other.{i}") for i in range(1000)]


def test_what_was_found_for_a_name_is_found_once() -> None:
    table = PatternTable({".*q": 1})
    assert table.key_of("a.q") == ".*q"
    table.budget.seconds = 0
    assert pattern_value(table, "a.q", 5) == 1
    with pytest.raises(ConfigError):
        table.key_of("b.q")


def test_a_group_of_layers_pattern_does_not_hide_the_number() -> None:
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"x": nn.Linear(2, 2)}) for _ in range(2)])})
    config = surgery.LoraConfig(target_modules=["x"], layers_to_transform=1, layers_pattern="(layers)")
    surgery.inject(model, config)
    assert {name for name, _ in model.named_parameters() if "lora_A" in name} == {"layers.1.x.lora_A.default.weight"}


def test_a_flag_in_the_middle_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"rank_pattern: '\(\?i\)x' is not a regular expression"):
        surgery.LoraConfig(target_modules=["0"], rank_pattern={"(?i)x": 4})


def test_a_config_with_patterns_is_copied_pickled_and_compared_as_before() -> None:
    config = surgery.LoraConfig(target_modules=["0"], rank_pattern={"a.*": 4}, alpha_pattern={"b": 2.0})
    assert config.method("a.0").tensors is not None
    told = surgery.IA3Config(target_modules=["0"], feedforward_modules="(a|b).*")
    assert told.method("a.0").feedforward
    assert told == copy.deepcopy(told) == pickle.loads(pickle.dumps(told)) == replace(told)
    for other in (copy.deepcopy(config), pickle.loads(pickle.dumps(config)), replace(config)):
        assert other == config
        assert repr(other) == repr(config)
        assert other.method("a.1") == config.method("a.1")
    assert asdict(config)["rank_pattern"] == {"a.*": 4}
    assert json.loads(json.dumps(config.to_json()))["rank_pattern"] == {"a.*": 4}
