"""The floors: a file imports only from lower floors or its own folder, and heavy packages only inside functions."""

import ast
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

import surgery

ROOT = Path(surgery.__file__).parent
FLOORS = (
    ("__main__",),
    ("cli",),
    ("api", "testing"),
    ("integrations",),
    ("procedures",),
    ("formats",),
    ("adapters", "hosts"),
    ("methods", "codecs", "ops", "layers", "io"),
    ("core",),
    ("errors", "public_names"),
)
WINGS = ("exports", "making", "live", "checking", "writing", "planning", "places")  # of procedures, top to bottom
FLOOR = {name: depth for depth, names in enumerate(FLOORS) for name in names}
HEAVY = frozenset({"bitsandbytes", "onnx", "transformers", "rich", "huggingface_hub", "peft"})
OF_A_HEAVY_CLASS = frozenset({"integrations/transformers/callback.py"})  # a class of theirs is the base of one there
FILES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py") if path.parent != ROOT / "examples")


def imported(source: str) -> Iterator[str]:
    """Every module that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def wrong(file: str, source: str) -> list[str]:
    """The imports of `file` that lead up, or sideways into another folder."""
    here = file.split("/", maxsplit=1)[0].removesuffix(".py")
    parts = [name.split(".") for name in imported(source)]
    there = [part[1] for part in parts if part[0] == "surgery" and len(part) > 1]
    return [name for name in there if name != here and FLOOR[name] <= FLOOR[here]]


@pytest.mark.parametrize("file", [file for file in FILES if file != "__init__.py"])
def test_a_file_imports_only_from_lower_floors(file: str) -> None:
    assert wrong(file, (ROOT / file).read_text()) == []


def wrong_wings(file: str, source: str) -> list[str]:
    """The imports of a file of procedures that lead from its folder to a folder above."""
    here = WINGS.index(file.split("/")[1])
    parts = [name.split(".") for name in imported(source)]
    there = [part[2] for part in parts if part[:2] == ["surgery", "procedures"] and len(part) > 2]
    return [name for name in there if WINGS.index(name) < here]


@pytest.mark.parametrize("file", [file for file in FILES if file.startswith("procedures/") and file.count("/") == 2])
def test_a_procedure_imports_only_from_its_folder_and_lower_ones(file: str) -> None:
    assert wrong_wings(file, (ROOT / file).read_text()) == []


@pytest.mark.parametrize(
    "source", ["from surgery.procedures.live.inject import inject", "from surgery.procedures import live"]
)
def test_a_procedure_that_imports_from_a_folder_above_is_found(source: str) -> None:
    assert wrong_wings("procedures/places/tying.py", source) == ["live"]


def test_every_procedure_lies_in_one_of_the_folders() -> None:
    folders = {file.split("/")[1] for file in FILES if file.startswith("procedures/") and file.count("/") == 2}
    assert folders == {*WINGS}
    assert [file for file in FILES if file.startswith("procedures/") and file.count("/") != 2] == [
        "procedures/__init__.py"
    ]


def heavy(source: str) -> set[str]:
    """The heavy packages that a file imports as it is imported itself, however deep in `try`, `if` or a class."""
    found, waiting = set(), [ast.parse(source)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import | ast.ImportFrom):
            found |= {name.split(".")[0] for name in imported(ast.unparse(node))}
        elif not isinstance(node, ast.FunctionDef | ast.Lambda) and "TYPE_CHECKING" not in _condition(node):
            waiting += ast.iter_child_nodes(node)
    return found & HEAVY


def _condition(node: ast.AST) -> str:
    return ast.unparse(node.test) if isinstance(node, ast.If) else ""


@pytest.mark.parametrize("file", [file for file in FILES if file not in OF_A_HEAVY_CLASS])
def test_heavy_packages_are_imported_inside_functions(file: str) -> None:
    assert heavy((ROOT / file).read_text()) == set()


@pytest.mark.parametrize(
    "source",
    ["import onnx", "try:\n    from peft import x\nexcept ImportError:\n    pass", "class A:\n    import rich.table"],
)
def test_a_heavy_package_that_is_imported_at_once_is_found(source: str) -> None:
    assert heavy(source)
    assert not heavy(f"def f():\n{textwrap.indent(source, '    ')}")


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("core/site.py", "from surgery.hosts.model import op_of"),
        ("methods/lora.py", "def f():\n    import surgery.ops.linear"),
        ("adapters/peft.py", "from surgery.hosts.checkpoint import Checkpoint"),
        ("procedures/plan.py", "from surgery import api"),
    ],
)
def test_an_import_that_leads_up_or_sideways_is_found(file: str, source: str) -> None:
    assert wrong(file, source)
