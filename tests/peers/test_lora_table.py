"""LoRA over every kind of layer, in each form: the laws, peft beside them, and the page that tells it."""

import re
from pathlib import Path

import pytest
import torch
from lora_table import DTYPES, FORMS, LAWS, LAYERS, PAGE, Cell, by_peft, refusal

PAIRS = [(layer, form) for layer in LAYERS for form in FORMS]
HELD = [pair for pair in PAIRS if pair[0] not in FORMS[pair[1]].refused]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.mark.parametrize("law", LAWS)
@each_dtype
@pytest.mark.parametrize(("layer", "form"), HELD, ids=str)
def test_the_law_holds(layer: str, form: str, dtype: torch.dtype, law: str, tmp_path: Path) -> None:
    LAWS[law](Cell(layer, form, dtype, tmp_path))


@each_dtype
@pytest.mark.parametrize(("layer", "form"), HELD, ids=str)
def test_each_reads_the_files_of_the_other_to_the_same_outputs(
    layer: str, form: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    assert by_peft(Cell(layer, form, dtype, tmp_path)) == "the same outputs, both ways"


@pytest.mark.parametrize(("layer", "form"), [pair for pair in PAIRS if pair not in HELD], ids=str)
def test_what_is_not_supported_is_refused_by_name(layer: str, form: str, tmp_path: Path) -> None:
    assert FORMS[form].refused[layer] in refusal(Cell(layer, form, torch.float32, tmp_path))


def test_the_page_has_every_cell() -> None:
    told = [
        line.strip("| ").split(" | ") for line in PAGE.read_text().splitlines() if re.match(r"\| (?!---|layer)", line)
    ]
    wanted = [[*pair, *[("yes" if pair in HELD else "refused")] * len(DTYPES)] for pair in PAIRS]
    assert [line[:4] for line in told] == wanted
