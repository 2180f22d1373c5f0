"""LoRA over every kind of layer, in each form: the laws, peft beside them, and the page that tells it."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_forms import FORMS, LAYERS
from lora_table import DTYPES, PAGE, WITHOUT_MERGE, Cell, by_peft, laws_of, refusal

PAIRS = [(layer, form) for layer in LAYERS for form in FORMS]
HELD = [pair for pair in PAIRS if pair[0] not in FORMS[pair[1]].refused]
ROWS = [line.strip("| ").split(" | ") for line in PAGE.read_text().splitlines() if re.match(r"\| (?!---|layer)", line)]
TOLD = {(layer, form): cells for layer, form, *cells in ROWS}


def in_turns(cells: Sequence[Sequence[str]]) -> list[Any]:
    """Each cell of a layer and a form, and maybe a law, in one dtype here and in the other in `make test-all`.

    By turns, so that each layer, form and law goes with each dtype, and half of the laws of a cell with each.
    """
    found = []
    for layer, form, *law in cells:
        turn = [*LAYERS].index(layer) + [*FORMS].index(form) + sum([*laws_of(form)].index(one) for one in law)
        for k, dtype in enumerate(DTYPES):
            marks = [pytest.mark.slow] if (turn + k) % 2 else []
            found.append(
                pytest.param(layer, form, *law, dtype, id="-".join([layer, form, *law, str(dtype)]), marks=marks)
            )
    return found


LAWS = in_turns([(*pair, law) for pair in HELD for law in laws_of(pair[1])])


@pytest.mark.parametrize(("layer", "form", "law", "dtype"), LAWS)
def test_the_law_holds(layer: str, form: str, law: str, dtype: torch.dtype, tmp_path: Path) -> None:
    laws_of(form)[law](Cell(layer, form, dtype, tmp_path))


@pytest.mark.parametrize(("layer", "form", "dtype"), in_turns(HELD))
def test_peft_makes_of_it_what_the_page_says(layer: str, form: str, dtype: torch.dtype, tmp_path: Path) -> None:
    assert by_peft(Cell(layer, form, dtype, tmp_path)) == TOLD[layer, form][-1]


@pytest.mark.parametrize(("layer", "form"), [pair for pair in PAIRS if pair not in HELD], ids=str)
def test_what_is_not_supported_is_refused_by_name(layer: str, form: str, tmp_path: Path) -> None:
    assert FORMS[form].refused[layer] in refusal(Cell(layer, form, torch.float32, tmp_path))


def test_the_page_has_every_cell() -> None:
    assert {pair: cells[:-1] for pair, cells in TOLD.items()} == {
        pair: ["refused" if pair not in HELD else WITHOUT_MERGE if FORMS[pair[1]].unmerged else "yes"] * len(DTYPES)
        for pair in PAIRS
    }
