"""Report texts: what a check found, as JSON, as Markdown, or as the XML of JUnit, for people and for CI."""

import json
import re
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple
from xml.etree import ElementTree as Xml

from surgery.core.report import Report
from surgery.errors import visible


class Case(NamedTuple):
    """One thing that was checked, such as a tensor: a test of JUnit and, where `listed`, a row of a table."""

    name: str
    verdict: str  # a word, by which the report counts its cases
    cells: Sequence[str]  # under the report's columns, after name and verdict
    listed: bool
    failure: str = ""  # why it fails, if it does


class CaseReport(Report):
    """A report on cases. The counts are by verdict; the first two columns are those of name and verdict."""

    @property
    @abstractmethod
    def title(self) -> str: ...

    @property
    @abstractmethod
    def columns(self) -> Sequence[str]: ...

    @property
    @abstractmethod
    def counts(self) -> Mapping[str, int]: ...

    @abstractmethod
    def cases(self) -> Iterator[Case]: ...


def as_json(report: Report) -> str:
    """The report's data, sorted by key."""
    return json.dumps(report.to_json(), indent=2, sort_keys=True) + "\n"


def as_markdown(report: CaseReport) -> str:
    """The summary, a table of the counts, and a table of the cases that are listed."""
    counts = [(_words(verdict), str(count)) for verdict, count in report.counts.items()]
    listed = [_row(case) for case in report.cases() if case.listed]
    parts = [f"# {_words(report.title)}", _words(report.summary()), _table((report.columns[1], "count"), counts)]
    return "\n\n".join([*parts, _table(report.columns, listed)] if listed else parts) + "\n"


def as_junit(report: CaseReport) -> str:
    """A test suite with a test case for each case; one that fails has a failure with the reason."""
    cases = list(report.cases())
    failed = sum(bool(case.failure) for case in cases)
    told = {"tests": str(len(cases)), "failures": str(failed), "errors": "0", "skipped": "0"}
    suite = Xml.Element("testsuite", {"name": visible(report.title), **told})
    for case in cases:
        test = Xml.SubElement(suite, "testcase", {"classname": visible(case.verdict), "name": visible(case.name)})
        if case.failure:
            Xml.SubElement(test, "failure", {"message": visible(case.failure), "type": visible(case.verdict)})
    Xml.indent(suite)
    data: bytes = Xml.tostring(suite, encoding="utf-8", xml_declaration=True)
    return data.decode() + "\n"


ENDINGS: Mapping[str, Callable[[CaseReport], str]] = {".json": as_json, ".md": as_markdown, ".xml": as_junit}


def _row(case: Case) -> Sequence[str]:
    return [_code(case.name), *map(_words, (case.verdict, *case.cells))]


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _words(text: str) -> str:
    """Text that Markdown shows as it is."""
    return re.sub(r"([\\`*_\[\]<>&|~#])", r"\\\1", visible(text))


def _code(name: str) -> str:
    """A span of code, within a table. Its fence is longer than any run of backticks in the name."""
    text = visible(name).replace("|", r"\|")
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    pad = " " if not text or text[0] in "` " or text[-1] in "` " else ""
    return f"{fence}{pad}{text}{pad}{fence}"
