"""The floors: a file imports only from lower floors or its own folder, and heavy packages only inside functions."""

import ast
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
    ("errors",),
)
WINGS = ("exports", "making", "live", "checking", "writing", "planning", "places")  # of procedures, top to bottom
FLOOR = {name: depth for depth, names in enumerate(FLOORS) for name in names}
HEAVY = frozenset({"bitsandbytes", "onnx", "transformers", "rich", "huggingface_hub", "peft"})
FILES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py") if path.parent != ROOT / "examples")


def imported(source: str) -> Iterator[str]:
    """Every module that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names = [alias.name for alias in node.names]
            yield from [f"surgery.{name}" for name in names] if node.module == "surgery" else [node.module or ""]


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


def test_a_procedure_that_imports_from_a_folder_above_is_found() -> None:
    assert wrong_wings("procedures/places/tying.py", "from surgery.procedures.live.inject import inject") == ["live"]


@pytest.mark.parametrize("file", FILES)
def test_heavy_packages_are_imported_inside_functions(file: str) -> None:
    tree = ast.parse((ROOT / file).read_text())
    top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {name.split(".")[0] for node in top for name in imported(ast.unparse(node))}
    assert not names & HEAVY


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
