"""README, docstrings and examples: every block runs, every command, page and folder that is named is there."""

import doctest
import importlib
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import surgery
from surgery.cli import surgery as command

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PACKAGE = Path(surgery.__file__).parent
WITH_EXAMPLES = sorted(path for path in PACKAGE.rglob("*.py") if ">>>" in path.read_text())


def blocks(language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)
    return [block for kind, block in found if kind == language]


def commands() -> list[list[str]]:
    """The words of each line of the README that calls `surgery`, without its comment."""
    lines = [line for block in blocks("") for line in block.splitlines()]
    return [line.partition("#")[0].split()[1:] for line in lines if line.startswith("surgery ")]


@pytest.mark.parametrize("block", blocks("python"))
def test_a_block_of_the_readme_runs(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=32))
    modules = {name: id(module) for name, module in model.named_modules()}
    before = {name: values.clone() for name, values in model.state_dict().items()}
    names = {"model": model}
    exec(block, names)
    assert names["model"] is model
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file() == ('"adapter/"' in block)
    assert {name: id(module) for name, module in model.named_modules()} == modules
    assert all(torch.equal(values, before[name]) for name, values in model.state_dict().items())


def test_the_readme_names_every_command_and_no_other() -> None:
    named = {words[0] for words in commands()}
    assert named | {"demo"} == set(command.commands)


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_an_option_that_the_readme_names_is_there(words: list[str]) -> None:
    line = next(line for block in blocks("") for line in block.splitlines() if line.split()[1:][: len(words)] == words)
    there = {option for parameter in command.commands[words[0]].params for option in parameter.opts}
    assert set(re.findall(r"--[a-z0-9-]+", line)) <= there


def test_every_page_is_linked_and_every_link_leads_to_a_page() -> None:
    pages = {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")}
    assert set(re.findall(r"\]\((docs/[^)]+)\)", README)) == pages


def test_the_map_of_the_code_has_every_folder() -> None:
    map_of_code = (ROOT / "CONTRIBUTING.md").read_text()
    named = set(re.findall(r"`(?:surgery/)?([a-z]+)/`", map_of_code))
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert folders <= named
    assert all((ROOT / name).is_dir() or (PACKAGE / name).is_dir() for name in named)


@pytest.mark.parametrize("path", WITH_EXAMPLES, ids=lambda path: path.stem)
def test_the_examples_of_docstrings_give_what_they_say(path: Path) -> None:
    module = importlib.import_module(".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts))
    found = doctest.testmod(module)
    assert found.attempted > 0
    assert found.failed == 0


EXAMPLES = {
    "library": "the model is what it was, bit for bit",
    "switch_adapters": "2 of 2 adapters go on as they were taught, alone and in one batch",
    "train_and_merge": "transformers alone gives what the merged model gives, to the bit",
    "train_lora": "8 of 8 sentences are told apart by the merged model",
    "train_ia3": "8 of 8 sentences are told apart by the merged model",
    "train_adalora": "8 of 8 sentences are told apart by the merged model",
    "train_quantized": "merged into nf4, the quantization-aware adapter is what it was",
}


def each_example(*quick: str) -> pytest.MarkDecorator:
    cases = [
        pytest.param(name, told, id=name, marks=[] if name in quick else [pytest.mark.slow])
        for name, told in EXAMPLES.items()
    ]
    return pytest.mark.parametrize(("name", "told"), cases)


@each_example(*(name for name in EXAMPLES if name != "train_quantized"))
def test_an_example_runs(
    name: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process, for to begin another takes as long as it runs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "examples"))  # as Python does for what it runs
    runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
    assert capsys.readouterr().out.splitlines()[-1] == told
    assert list(tmp_path.iterdir()) == []


@each_example("library")
def test_an_example_runs_in_a_process_of_its_own(name: str, told: str, tmp_path: Path) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / f"{name}.py")],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == told
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_demo_gives_the_original_bytes_back(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    done = subprocess.run(
        [sys.executable, "-m", "surgery", "demo", "--out", str(out)], capture_output=True, text=True, check=True
    )
    assert "recall@1" in done.stdout
    restored = {path.name for path in (out / "restored").rglob("*") if path.is_file()}
    assert "model.safetensors" in restored
    assert not {name for name in restored if name.startswith("surgery.")}
