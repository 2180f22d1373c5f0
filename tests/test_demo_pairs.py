"""The demo's sentence pairs: enough of them, nothing shared between training and held out, and made by the script."""

import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def pairs(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (EXAMPLES / name).read_text().splitlines()]


@pytest.fixture(scope="module")
def maker() -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLES / "make_pairs.py"), run_name="maker")


def test_there_are_enough_and_none_twice() -> None:
    train, held_out = pairs("pairs_train.jsonl"), pairs("pairs_held_out.jsonl")
    assert len(train) >= 300
    assert len(held_out) >= 100
    assert len({pair["answer"] for pair in train + held_out}) == len(train) + len(held_out)
    assert not {pair["query"] for pair in train} & {pair["query"] for pair in held_out}


def test_no_template_is_shared(maker: dict[str, Any]) -> None:
    train = {text for pair in maker["TRAIN"] for text in pair}
    held_out = {text for pair in maker["HELD_OUT"] for text in pair}
    assert not train & held_out


@pytest.mark.parametrize(("name", "templates"), [("pairs_train.jsonl", "TRAIN"), ("pairs_held_out.jsonl", "HELD_OUT")])
def test_every_pair_comes_of_its_own_templates(maker: dict[str, Any], name: str, templates: str) -> None:
    words = {kind: list(known) for kind, known in maker["VOCABULARY"].items()}
    fits = [_pattern(query, words) for query, _ in maker[templates]]
    assert all(any(fit.fullmatch(pair["query"]) for fit in fits) for pair in pairs(name))


def _pattern(template: str, words: dict[str, list[str]]) -> re.Pattern[str]:
    pattern = re.escape(template).replace(r"\{", "{").replace(r"\}", "}")
    choices = {kind: f"(?:{'|'.join(map(re.escape, known))})" for kind, known in words.items()}
    return re.compile(pattern.format(**choices))
