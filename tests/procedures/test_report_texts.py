"""Reports as text: valid JSON, Markdown and JUnit for any name, with every failure told."""

import json
import re
import xml.etree.ElementTree as Xml
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import surgery
from surgery.core.report import Report
from surgery.errors import visible
from surgery.procedures.checking.grade import Grade
from surgery.procedures.checking.report import as_json, as_junit, as_markdown
from surgery.procedures.checking.verify_report import VerifyReport

CONTROLS = "a\x00b\x1b[31m\r\n\t\x07\u202e\x85\ufffe\ud800|`*_<b>&amp;\"']]>"
NAMES = st.lists(st.integers(0, 0x10FFFF) | st.integers(0, 0x2FF), max_size=12).map(
    lambda codes: "".join(map(chr, codes))
)
GRADES = {
    "model.a": Grade("bits"),
    "model.b": Grade("rounding", 1e-3),
    "model.c": Grade("different", float("nan"), "further off than rounding explains"),
    "model.d": Grade("untouched"),
    "model.e": Grade("different", 2.0, "it is missing"),
}


def _report(grades: dict[str, Grade]) -> VerifyReport:
    return VerifyReport(Path("out"), grades)


def _lines(markdown: str) -> list[list[str]]:
    """The cells of each line of a table, split at the pipes that are not escaped."""
    rows = [line for line in markdown.split("\n") if line.startswith("|")]
    return [re.split(r"(?<!\\)\|", row[1:-1]) for row in rows]


@pytest.mark.parametrize("name", [*(one for one in surgery.__all__ if one.endswith("Report")), "Inspection", "Plan"])
def test_a_report_that_is_shown_is_its_summary(name: str) -> None:
    report = getattr(surgery, name)
    assert issubclass(report, Report)
    assert (report.__str__, report.__repr__) == (Report.__str__, Report.__repr__)


def test_a_report_is_shown_in_one_short_line_with_its_name() -> None:
    grades = {f"model.layers.{at}.weight": Grade("bits") for at in range(1000)}
    assert str(_report(grades)) == "1000 bits, 0 different"
    assert repr(_report(grades)) == "VerifyReport(1000 bits, 0 different)"


def test_json_is_the_data_of_the_report() -> None:
    report = _report(GRADES)
    assert json.loads(as_json(report), parse_constant=pytest.fail) == report.to_json()


def test_markdown_has_the_summary_the_counts_and_what_is_not_as_good_as_can_be() -> None:
    text = as_markdown(_report(GRADES))
    assert text.startswith(
        "# surgery verify out\n\n1 bits, 1 rounding, 1 untouched, 2 different\n\n| grade | count |\n"
    )
    rows = [[cell.strip() for cell in line] for line in _lines(text)]
    assert rows[2:7] == [["bits", "1"], ["rounding", "1"], ["untouched", "1"], ["recorded", "0"], ["different", "2"]]
    assert rows[7] == ["tensor", "grade", "max abs error", "why"]
    assert rows[9:] == [
        ["`model.b`", "rounding", "0.001", ""],
        ["`model.c`", "different", "nan", "further off than rounding explains"],
        ["`model.e`", "different", "2", "it is missing"],
    ]


def test_markdown_without_anything_to_list_has_one_table() -> None:
    assert as_markdown(_report({"a": Grade("bits")})).count("---") == 2


def test_junit_is_one_suite_with_a_test_for_each_tensor() -> None:
    suite = Xml.fromstring(as_junit(_report(GRADES)))
    assert suite.tag == "testsuite"
    assert suite.attrib == {
        "name": "surgery verify out",
        "tests": "5",
        "failures": "2",
        "errors": "0",
        "skipped": "0",
    }
    assert [(test.tag, test.get("classname"), test.get("name")) for test in suite] == [
        ("testcase", one.grade, name) for name, one in GRADES.items()
    ]
    failures = {test.get("name"): [one.get("message") for one in test.iter("failure")] for test in suite}
    assert failures == {name: [one.why] if one.grade == "different" else [] for name, one in GRADES.items()}


@settings(deadline=None)
@given(NAMES, NAMES)
@example(CONTROLS, CONTROLS)
@example("", "")
@example("`a`", "\\|")
@example("a\\", "``")
def test_no_name_and_no_reason_breaks_a_format(name: str, why: str) -> None:
    report = _report({name: Grade("different", 1.0, why)})
    case = Xml.fromstring(as_junit(report).encode())[0]
    assert case.get("name") == visible(name)
    assert case[0].get("message") == visible(why or "different")
    text = as_markdown(report)
    assert all(line.isprintable() for line in text.split("\n"))
    assert [len(line) for line in _lines(text)[7:]] == [4, 4, 4]
    json.loads(as_json(report))


@pytest.mark.parametrize(
    "char", [*map(chr, range(32)), "\x7f", "\x85", "\u202e", "\ufffe", "\uffff", "\ud800", "\u3164", "\ufe0f"]
)
def test_what_xml_or_a_terminal_cannot_hold_is_spelled(char: str) -> None:
    assert visible(f"a{char}b").isascii()
    assert visible(f"a{char}b").isprintable()


def test_what_can_be_printed_stays() -> None:
    assert visible("größe/層 a\\b 🙂") == "größe/層 a\\b 🙂"
