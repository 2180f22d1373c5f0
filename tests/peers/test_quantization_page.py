"""docs/quantization.md says of each format what the code does."""

import pytest

from bench import formats
from surgery.codecs import FORMS


def table() -> dict[str, dict[str, str]]:
    lines = formats.PAGE.read_text().partition(formats.MARKS[0])[2].partition(formats.MARKS[1])[0].strip().splitlines()
    head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return {row[0]: dict(zip(head, row, strict=True)) for row in rows}


PAGE = table()
each_format = pytest.mark.parametrize("name", formats.EXAMPLES)


def test_the_page_has_every_format_and_every_codec_is_on_it() -> None:
    assert list(PAGE) == list(formats.EXAMPLES)
    assert {*FORMS} <= {*PAGE}
    assert {one.codec.name for one in formats.EXAMPLES.values()} == {*formats.CODEC} - {"plain"}
    assert tuple(next(iter(PAGE.values()))) == formats.HEAD


@each_format
def test_what_it_says_of_live_layers_and_of_awareness_is_so(name: str) -> None:
    assert PAGE[name]["live layers"] == formats.live(name)
    assert PAGE[name]["quantization-aware"] == formats.aware(name)


@each_format
def test_what_it_says_of_decoding_merging_keeping_and_undoing_is_so(name: str) -> None:
    """On a smaller weight, whose figures are others."""
    example, weight = formats.EXAMPLES[name], formats.weight(256)
    packed = example.fresh(weight)
    assert PAGE[name]["decoded as by its library"] == "0 of 1,048,576 elements differ"
    assert formats.compared(example, packed) == "0 of 65,536 elements differ"
    merged = [PAGE[name][column] for column in ("merged to 16 bit, verified", "undone")]
    assert formats.merged(example, packed, weight) == merged
    kept = [value for column, value in PAGE[name].items() if column.startswith("kept")]
    assert formats.kept(example, packed, 1.0).startswith("retained")
    assert {cell.split()[0] for cell in kept} == {"retained"}
    near, fed = (formats.calibrated(example, packed).split(",") * 2)[:2]
    assert (near == "not for experts") == (example.codec.name == "mxfp4")
    assert near == "not for experts" or float(fed) < float(near)
