"""The nearest names, and whether names end in one of many texts, are found in bounded time and rightly."""

import difflib
import time

from hypothesis import given
from hypothesis import strategies as st

from surgery.core.names import CANDIDATES, COMPARED, Endings, nearest

texts = st.text(alphabet="ab.", max_size=6)


def test_of_few_names_the_nearest_are_difflibs() -> None:
    names = [f"model.layers.{i}.self_attn.{x}_proj" for i in range(20) for x in "qkvo"]
    entry = "model.layer.3.self_attn.q_prj"
    assert nearest(entry, names) == difflib.get_close_matches(entry, sorted(names), 3, 0.0)
    assert nearest("q_prj", names) == ["q_proj", "v_proj", "o_proj"]


def test_of_very_many_names_those_with_the_most_components_in_common_are_compared() -> None:
    names = [
        f"model.layers.{i}.mlp.experts.{j}.{x}_proj" for i in range(60) for j in range(100) for x in ("up", "down")
    ]
    start = time.process_time()
    found = nearest("model.layers.7.mlp.expert.99.up_proj", names)
    assert time.process_time() - start < 1
    assert found[0] == "model.layers.7.mlp.experts.99.up_proj"
    assert len(names) > CANDIDATES


def test_very_long_names_are_not_compared() -> None:
    start = time.process_time()
    assert nearest("a." + "b" * 100_000, [f"c.{i}" + "d" * 1000 for i in range(400)] + ["a.b"]) == ["a.b"]
    assert time.process_time() - start < 1
    assert COMPARED < 1000


@given(entries=st.lists(texts, max_size=6), names=st.lists(texts, min_size=1, max_size=6))
def test_a_name_ends_in_one_of_many_texts_as_it_does_for_python(entries: list[str], names: list[str]) -> None:
    ends = Endings(entries)
    assert [ends.end(name) for name in names] == [name.endswith(tuple(entries)) for name in names]


def test_very_many_endings_are_held_against_very_many_names_in_time() -> None:
    entries, names = [f"{i}.a_proj" for i in range(100_000)], [f"{i}.b_proj" for i in range(100_000)]
    start = time.process_time()
    ends = Endings(entries)
    assert not any(ends.end(name) for name in names)
    assert all(ends.end(f"model.layers.{entry}") for entry in entries[::100])
    assert time.process_time() - start < 2
