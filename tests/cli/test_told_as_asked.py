"""What is said to who calls the command line: in its own words, with the reason, and with the next step."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from checkpoint_folders import SITES, factors, write_adapter
from outcomes import Run, told
from quantized_folders import SHAPES, quantized_base

import surgery
from surgery.cli import surgery as command
from surgery.codecs import FORMS
from surgery.procedures.planning.treatment import INTO, UNMADE

PYTHON_S = re.compile(r"`\w+(=\w+)?`|\b(base_as|compute_dtype|min_retained|max_noise|max_shard_size|give into)\b")
DASHES = re.compile(r"(?<!surgery )(?<!surgery merge )--[a-z]")
CLASHES = [
    (["--fallback", "16bit"], "--fallback is for merges into a format; give --into, or leave it out"),
    (["--min-retained", "1"], "--min-retained is for merges into a format"),
    (["--max-noise", "nought"], "--max-noise"),
    (["--probes", "-1"], "--probes is -1; a whole number from 0"),
    (["--probes", "4"], "--probes is for merges into a format"),
    (["--rounding", "feedback"], "--rounding is for merges into a format"),
    (["--into", "nf4", "--base-as", "nf4"], "--into nf4 takes no --base-as"),
    (["--base-as", "nf4", "--arithmetic", "peft"], "--base-as is given, and --arithmetic peft"),
    (["--into", "keep"], "leave --into out"),
    (["--compute-dtype", "float16"], "leave --compute-dtype out"),
    (["--into", "nf4", "--min-retained", "nan"], "--min-retained is 'nan'"),
    (["--max-shard-size", "5"], "--max-shard-size is '5', which is of bytes; say it with its unit, such as 5GB"),
    (["--max-shard-size", "five"], "--max-shard-size is 'five'"),
    (["--into", "nf5"], f"--into is 'nf5'; one of {', '.join(INTO)} is wanted"),
    (["--base-as", "nf5"], f"--base-as is 'nf5'; one of {', '.join(FORMS)} is wanted"),
]


@pytest.mark.parametrize(("options", "words"), CLASHES, ids=lambda one: " ".join(one) if isinstance(one, list) else "")
def test_an_option_is_named_as_it_was_given(
    options: list[str], words: str, run: Run, base: Path, adapter: Path, tmp_path: Path
) -> None:
    message = told(run("merge", base, adapter, tmp_path / "out", *options), 2)
    assert words in message
    assert not PYTHON_S.search(message), message
    assert not (tmp_path / "out").exists()


def test_the_same_error_names_the_option_as_python_has_it(base: Path, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(surgery.UsageError, match="`fallback` is for merges into a format; give `into`"):
        surgery.merge_checkpoint(base, adapter, tmp_path / "out", fallback="16bit")


def test_no_message_below_the_command_line_spells_an_option_as_it_does() -> None:
    root, found = Path(surgery.__file__).parent, []
    for path in sorted(root.rglob("*.py")):
        if path.relative_to(root).parts[0] not in {"cli", "examples"}:
            found += [f"{path.name}: {one}" for one in said(path.read_text()) if DASHES.search(one)]
    assert found == []


def test_a_message_that_does_is_found() -> None:
    source = '''"""Not --this."""\nraise E(f"{x}: choose a --dtype; " "or `surgery merge --into y`")\n'''
    assert [one for one in said(source) if DASHES.search(one)] == ["?: choose a --dtype; or `surgery merge --into y`"]
    assert not DASHES.search("`surgery merge --into y`; `surgery --debug` shows where")


def said(source: str) -> Iterator[str]:
    """The texts of a file that are no docstrings, with a mark for what they are filled with."""
    for statement in (one for one in ast.walk(ast.parse(source)) if isinstance(one, ast.stmt)):
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            continue
        for one in ast.iter_child_nodes(statement):
            yield from (spelled(text) for text in texts(one))


def texts(node: ast.AST) -> Iterator[ast.AST]:
    if isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str)):
        yield node
    elif not isinstance(node, ast.stmt):
        yield from (text for one in ast.iter_child_nodes(node) for text in texts(one))


def spelled(text: ast.AST) -> str:
    parts = text.values if isinstance(text, ast.JoinedStr) else [text]
    return "".join(str(one.value) if isinstance(one, ast.Constant) else "?" for one in parts)


def test_a_plan_lists_refusals_and_notes_in_the_words_of_the_command_line(run: Run, base: Path, tmp_path: Path) -> None:
    whole = write_adapter(tmp_path / "whole", factors(SITES[:1]))
    listed = run("plan", base, whole, "--base-as", "w4a16").out
    assert "refused: model.layers.0.q_proj.weight: --base-as w4a16 does not hold it: [6, 6] in bfloat16" in listed
    assert "int4" not in listed


@pytest.mark.parametrize(("option", "value"), UNMADE)
def test_a_value_that_may_be_asked_for_is_refused_with_the_reason(
    option: str, value: str, run: Run, base: Path, adapter: Path, tmp_path: Path
) -> None:
    spelled = f"--{option.replace('_', '-')}"
    message = told(run("merge", base, adapter, tmp_path / "out", spelled, value), 2)
    assert message.startswith(f"{spelled} {value}: ")
    assert "give " in message


def test_what_can_never_work_is_no_choice() -> None:
    choices = {one.name: one.type.to_info_dict().get("choices") for one in command.commands["merge"].params}
    assert [*choices["into"]] == [*INTO]
    assert [*choices["base_as"]] == [*FORMS]
    assert [*choices["fallback"]] == ["16bit"]


def test_help_names_no_option_that_the_command_lacks(run: Run) -> None:
    for name in command.commands:
        shown = run(name, "--help").out
        known = {opt for one in command.commands[name].params for opt in (*one.opts, *one.secondary_opts)}
        others = {*re.findall(r"(?<![\w`-])--[a-z][a-z0-9-]*", re.sub(r"`surgery [^`]*`", "", shown))} - known
        assert others <= {"--help", "--reversible"}, (name, others)


@pytest.mark.parametrize("weight", ["0", "1e30", "-1000"])
def test_a_weight_that_leaves_nothing_is_a_note_of_plan_and_merge(
    weight: str, run: Run, base: Path, adapter: Path, tmp_path: Path
) -> None:
    note = f"{adapter}: its weight is {float(weight):g}, "
    note += "so that nothing of it is merged" if weight == "0" else "by which its change dwarfs the base"
    assert note in run("plan", base, f"{adapter}={weight}").out
    found = run("merge", base, f"{adapter}={weight}", tmp_path / "out")
    assert found.code == 0
    assert f"surgery: note: {note}" in found.err


@pytest.mark.parametrize("weights", [(0.5, 0.5), (2, 1)])
def test_the_same_adapter_given_twice_is_a_note(
    weights: tuple[float, float], run: Run, base: Path, adapter: Path, tmp_path: Path
) -> None:
    copied = tmp_path / "copied"
    copied.mkdir()
    for path in adapter.iterdir():
        (copied / path.name).write_bytes(path.read_bytes())
    given = [f"{one}={weight}" for one, weight in zip((adapter, copied), weights, strict=True)]
    listed = run("plan", base, *given).out
    assert f"{adapter}: the same adapter is given 2 times, by {sum(weights):g} in all" in listed
    assert "the same" not in run("plan", base, given[0], f"{write_adapter(tmp_path / 'other', r=8)}").out


def test_weights_as_usual_are_no_note(run: Run, base: Path, adapter: Path) -> None:
    for weight in ("1", "-1", "0.001", "16", "999"):
        assert "weight is" not in run("plan", base, f"{adapter}={weight}").out


def test_a_base_held_in_codes_is_told_by_its_form(run: Run, tmp_path: Path) -> None:
    nf4 = quantized_base(tmp_path / "nf4", "nf4")
    site = SITES[0]
    out, into = SHAPES[site.rpartition(".")[2]]
    net = torch.nn.Module()
    model = torch.nn.ModuleDict({"model": torch.nn.ModuleDict({"layers": torch.nn.ModuleList([net])})})
    net.q_proj = torch.nn.Linear(into, out, bias=False, dtype=torch.bfloat16)
    surgery.save(surgery.inject(model, surgery.LoraConfig(r=4, target_modules=["q_proj"])), tmp_path / "adapter")
    assert "trained on a base in bfloat16, this one is in nf4;" in run("plan", nf4, tmp_path / "adapter").out


def test_sizes_are_told_in_units_that_fit(run: Run, base: Path, adapter: Path) -> None:
    assert run("inspect", adapter).out.endswith("8 tensors, 896 bytes\n")
    assert "; 702 bytes to write, about 300.0 MB of memory" in run("plan", base, adapter).out


def test_an_adapter_s_table_has_no_empty_columns(run: Run, base: Path, adapter: Path) -> None:
    assert run("inspect", adapter).out.splitlines()[0].split() == ["name", "shape", "dtype", "bytes"]
    assert run("inspect", base).out.splitlines()[0].split() == ["name", "op", "shape", "dtype", "bytes"]


def test_the_demo_says_that_it_exports(run: Run) -> None:
    assert "exports" in run("demo", "--help").out


def test_a_pattern_is_told_as_it_was_written(run: Run, base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", target_modules=r".*\.(q|up)_proj", rank_pattern={r"never\d+": 4})
    listed = run("plan", base, adapter).out
    assert r"by '.*\.(q|up)_proj'" in listed
    assert r"rank_pattern entry 'never\d+' matches no tensors" in listed


@pytest.mark.parametrize(
    "arguments",
    [
        ["{out}", "--outputs"],
        ["{out}", "--base-as", "nf4"],
        ["{base}", "{adapter}", "{out}", "--layers"],
    ],
)
def test_verify_says_what_is_missing(arguments: list[str], run: Run, base: Path, adapter: Path, tmp_path: Path) -> None:
    assert run("merge", base, adapter, tmp_path / "out").code == 0
    given = [one.format(base=base, adapter=adapter, out=tmp_path / "out") for one in arguments]
    message = told(run("verify", *given), 2)
    assert re.search("name base and adapters too|give --outputs too", message), message
