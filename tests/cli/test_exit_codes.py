"""Each exit code, and what stands on stderr then: one line, `surgery: ...`, with names escaped."""

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from checkpoint_folders import factors, file_hashes, flip_byte, rewrite, write_adapter
from huggingface_hub import errors
from outcomes import Run, told

import surgery
from surgery.api import checking
from surgery.cli import interrupts
from surgery.cli import surgery as command
from surgery.cli.interrupts import Interrupted, listen
from surgery.core.site import TensorInfo
from surgery.io.fingerprint import base_print_bytes
from surgery.io.lock import Lock

FUNCTIONS = {
    "inspect": ("inspect", ["x"]),
    "plan": ("plan", ["x", "y"]),
    "merge": ("merge_checkpoint", ["x", "y", "z"]),
    "verify": ("verify_checkpoint", ["x"]),
    "unmerge": ("unmerge_checkpoint", ["x", "y"]),
    "diff": ("diff", ["x", "y"]),
    "extract": ("extract", ["x", "y", "z", "--rank", "1"]),
}
HEAVY = {"torch", "numpy", "transformers", "huggingface_hub", "safetensors", "rich"}
HELP = f"""
import sys
from surgery.cli import main
try:
    main(sys.argv[1:])
except SystemExit as stopped:
    assert not stopped.code
assert not {HEAVY} & sys.modules.keys(), {HEAVY} & sys.modules.keys()
"""
CONTROLS = "\x1b[31m\r\n\x07\u202e\x85"


def failing(monkeypatch: pytest.MonkeyPatch, name: str, error: BaseException) -> None:
    """Let a function of the api raise `error`."""

    def fail(*_: object, **__: object) -> NoReturn:
        raise error

    monkeypatch.setattr(f"{getattr(surgery, name).__module__}.{name}", fail)


@pytest.mark.parametrize("name", ["", *sorted(command.commands)])
def test_help_is_code_0_and_imports_nothing_heavy(name: str) -> None:
    arguments = [name, "--help"] if name else ["--help"]
    found = subprocess.run([sys.executable, "-c", HELP, *arguments], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stderr) == (0, "")
    assert found.stdout.startswith(f"Usage: surgery {name}".rstrip())


LOGGING = """
import sys
from surgery.cli import main
sys.argv = ["surgery", "inspect", "/nowhere"]
try:
    main()
except SystemExit as stopped:
    assert stopped.code == 3
import torchao.quantization
"""


@pytest.mark.skipif(find_spec("torchao") is None, reason="of torchao, which transformers imports where it is")
def test_a_command_prints_nothing_of_what_torchao_logs() -> None:
    found = subprocess.run([sys.executable, "-c", LOGGING], capture_output=True, text=True, check=True)
    (line,) = found.stderr.splitlines()
    assert line.startswith("surgery: /nowhere: no such file")


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["never-heard-of"],
        ["--unknown", "merge"],
        *([name, "--unknown"] for name in FUNCTIONS),
        *([name, *given[1:]] for name, (_, given) in FUNCTIONS.items()),
        ["inspect", "x", "y"],
        ["unmerge", "x", "y", "z"],
        ["merge", "x", "y", "z", "--dtype", "int8"],
        ["merge", "x", "y", "z", "--dtype"],
        ["verify", "x", "y"],
        ["verify", "x", "--base", "y"],
        ["verify", "x", "--adapter", "y"],
        ["verify", "x", "y", "z", "--base", "b", "--adapter", "a"],
        [f"never{CONTROLS}"],
        ["merge", f"--{CONTROLS}"],
    ],
    ids=repr,
)
def test_a_call_that_makes_no_sense_is_code_2(arguments: list[str], run: Run) -> None:
    found = run(*arguments)
    told(found, 2)
    assert found.out == ""


def test_a_weight_on_replaced_modules_is_code_2(run: Run, base: Path, tmp_path: Path) -> None:
    tensors = factors() | {"lm_head.weight": torch.ones(11, 6)}
    adapter = write_adapter(tmp_path / "saved", tensors, modules_to_save=["lm_head"])
    assert "modules_to_save" in told(run("merge", base, f"{adapter}=0.5", tmp_path / "out"), 2)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("spelled", ["/nowhere/at/all", "./missing", "../missing", "missing", "a" * 300])
def test_a_missing_input_is_code_3(
    spelled: str, run: Run, base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(base)
    before = file_hashes(base.parent)
    lines = [["inspect", spelled], ["plan", spelled, adapter], ["plan", base, spelled], ["merge", spelled, adapter]]
    lines += [["merge", base, spelled], ["verify", spelled], ["verify", base, adapter, spelled], ["unmerge", spelled]]
    for line in lines:
        output = [base.parent / "out"] if line[0] in ("merge", "unmerge") else []
        assert "no such file or folder" in told(run(*line, *output), 3)
    assert file_hashes(base.parent) == before


@pytest.mark.parametrize("name", ["plan", "merge"])
def test_a_refused_adapter_is_code_3(name: str, run: Run, base: Path, adapter: Path, tmp_path: Path) -> None:
    rewrite(adapter / "adapter_model.safetensors", {"base_model.model.other.lora_A.weight": torch.ones(4, 6)})
    found = run(name, base, adapter, *([tmp_path / "out"] if name == "merge" else []))
    assert str(adapter) in told(found, 3)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("as_json", [(), ("--json",)])
def test_a_plan_with_refusals_is_code_3(as_json: tuple[str, ...], run: Run, base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "wrong", factors() | {"nowhere.lora_A.weight": torch.ones(4, 6)} | _b("nowhere"))
    found = run("plan", base, adapter, *as_json)
    assert "1 refused" in told(found, 3)
    assert "nowhere" in found.out


@pytest.mark.parametrize("as_json", [(), ("--json",)])
@pytest.mark.parametrize("derived", [False, True])
def test_a_changed_output_is_code_4(
    derived: bool, as_json: tuple[str, ...], run: Run, base: Path, adapter: Path
) -> None:
    out = base.parent / "out"
    run("merge", base, adapter, out)
    assert run("verify", out).code == 0
    flip_byte(out / "model.safetensors")
    assert printed(out) in told(run("verify", *([base, adapter] if derived else []), out, *as_json), 4)


def test_an_unmerge_of_a_changed_output_is_code_4(run: Run, base: Path, adapter: Path, tmp_path: Path) -> None:
    run("merge", base, adapter, tmp_path / "out", "--reversible")
    flip_byte(tmp_path / "out" / "model.safetensors")
    assert "sha256" in told(run("unmerge", tmp_path / "out", tmp_path / "back"), 4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "out"]


@pytest.mark.parametrize("parent", ["file", "file/deeper", "/proc/self", "/proc/none", "n" * 300])
def test_an_output_that_cannot_be_written_is_code_5(
    parent: str, run: Run, base: Path, adapter: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("a file")
    run("merge", base, adapter, tmp_path / "merged", "--reversible")
    before = file_hashes(tmp_path)
    assert "out" in told(run("merge", base, adapter, tmp_path / parent / "out"), 5)
    assert "out" in told(run("unmerge", tmp_path / "merged", tmp_path / parent / "out"), 5)
    assert file_hashes(tmp_path) == before


@pytest.mark.parametrize("error", [MemoryError(), OSError(errno.ENOSPC, "No space left"), OSError("no number")])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_fault_of_the_machine_is_code_5(
    name: str, error: Exception, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    function, arguments = FUNCTIONS[name]
    failing(monkeypatch, function, error)
    assert "None" not in told(run(name, *arguments), 5)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.LocalEntryNotFoundError("not cached, no network"), 5),
        (OSError(errno.EIO, "broken"), 5),
        (errors.HFValidationError("no such name"), 3),
    ],
)
def test_a_hub_that_gives_nothing_is_told_by_its_cause(
    error: Exception, code: int, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(*_: object, **__: object) -> NoReturn:
        raise error

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", download)
    assert told(run("inspect", "owner/name@main"), code).startswith("owner/name@main: ")


def _folder(out: Path) -> None:
    out.mkdir()


def _file(out: Path) -> None:
    out.write_text("kept")


def _dangling(out: Path) -> None:
    out.symlink_to("nowhere")


@pytest.mark.parametrize("made", [_folder, _file, _dangling])
def test_an_output_that_exists_is_code_6(made: Callable[[Path], None], run: Run, base: Path, adapter: Path) -> None:
    out, merged = base.parent / "out", base.parent / "merged"
    run("merge", base, adapter, merged, "--reversible")
    made(out)
    before = file_hashes(base.parent)
    assert "--overwrite" in told(run("merge", base, adapter, out), 6)
    assert "--overwrite" in told(run("unmerge", merged, out), 6)
    assert file_hashes(base.parent) == before


@pytest.mark.parametrize("made", [_file, _dangling])
def test_overwrite_never_removes_what_is_no_folder(
    made: Callable[[Path], None], run: Run, base: Path, adapter: Path, tmp_path: Path
) -> None:
    made(tmp_path / "out")
    before = file_hashes(tmp_path)
    assert "holds no model and no adapter" in told(run("merge", base, adapter, tmp_path / "out", "--overwrite"), 6)
    assert file_hashes(tmp_path) == before
    assert (tmp_path / "out").is_symlink() is (made is _dangling)


@pytest.mark.parametrize("command", ["merge", "combine"])
def test_overwrite_never_removes_a_folder_of_other_things(
    command: str, run: Run, base: Path, adapter: Path, tmp_path: Path
) -> None:
    (home := tmp_path / "home").mkdir()
    assert run("combine", adapter, home, "--overwrite").code == 0  # an empty one
    (tmp_path / "notes/models").mkdir(parents=True)
    (tmp_path / "notes/models/model.safetensors").write_bytes(b"mine")
    given = (base, adapter) if command == "merge" else (adapter,)
    assert "holds no model and no adapter" in told(run(command, *given, tmp_path / "notes", "--overwrite"), 6)
    assert (tmp_path / "notes/models/model.safetensors").read_bytes() == b"mine"


@pytest.mark.parametrize("options", [(), ("--overwrite",)])
@pytest.mark.parametrize("out", ["base", "adapter", "base/in", "adapter/deep/in", "base/../adapter", ".", "link"])
def test_an_output_that_overlaps_an_input_is_code_6(
    out: str, options: tuple[str, ...], run: Run, base: Path, adapter: Path, tmp_path: Path
) -> None:
    (tmp_path / "link").symlink_to("base")
    before = file_hashes(tmp_path)
    told(run("merge", base, adapter, tmp_path / out, *options), 6)
    assert file_hashes(tmp_path) == before


@pytest.mark.parametrize("options", [(), ("--overwrite",)])
@pytest.mark.parametrize("out", ["merged", "merged/in", ".", "merged/surgery.undo"])
def test_an_unmerge_over_its_input_is_code_6(
    out: str, options: tuple[str, ...], run: Run, base: Path, adapter: Path, tmp_path: Path
) -> None:
    run("merge", base, adapter, tmp_path / "merged", "--reversible")
    before = file_hashes(tmp_path)
    told(run("unmerge", tmp_path / "merged", tmp_path / out, *options), 6)
    assert file_hashes(tmp_path) == before


def test_an_output_that_another_run_writes_is_code_6(run: Run, base: Path, adapter: Path, tmp_path: Path) -> None:
    lock = Lock(tmp_path / "out")
    assert f"another run is writing it (process {os.getpid()})" in told(
        run("merge", base, adapter, tmp_path / "out"), 6
    )
    lock.release()
    assert run("merge", base, adapter, tmp_path / "out").code == 0


def test_a_demo_into_a_folder_in_use_is_code_6(run: Run, base: Path) -> None:
    told(run("demo", "--out", base), 6)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_bug_is_code_1_in_one_line(name: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    function, arguments = FUNCTIONS[name]
    failing(monkeypatch, function, RuntimeError(f"second\nline{CONTROLS}"))
    assert told(run(name, *arguments), 1).startswith("RuntimeError: second\\nline\\x1b")


@pytest.mark.parametrize(("error", "code"), [(RuntimeError("boom"), 1), (MemoryError(), 5)])
def test_debug_shows_the_traceback_and_keeps_the_code(
    error: Exception, code: int, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, "inspect", error)
    found, brief = run("--debug", "inspect", "x"), run("inspect", "x")
    assert found.code == brief.code == code
    assert found.err.startswith("Traceback (most recent call last)")
    assert "in fail\n" in found.err
    assert found.err.endswith(brief.err)


def test_an_interrupt_is_code_130(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, "inspect", KeyboardInterrupt())
    found = run("inspect", "x")
    assert (found.code, found.err.strip()) == (130, "surgery: interrupted")


def test_a_signal_that_python_turns_into_another_error_is_a_signal_still(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Named:
        def __set_name__(self, owner: type, name: str) -> None:
            raise Interrupted(signal.SIGTERM)

    def fail(*_: object, **__: object) -> None:
        type("Owner", (), {"field": Named()})  # Python 3.11 wraps what it raises; so it is where a library is imported

    monkeypatch.setattr(checking, "inspect", fail)
    found = run("inspect", "x")
    assert (found.code, found.err) == (128 + signal.SIGTERM, "surgery: interrupted\n")


def test_a_signal_that_compiled_code_drops_is_told_by_the_failure_that_comes_of_it(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interrupts, "_came", [])

    def fail(*_: object, **__: object) -> None:
        with contextlib.suppress(Interrupted):
            os.kill(os.getpid(), signal.SIGTERM)
        raise AttributeError("module 'numpy' has no attribute 'nonzero'")

    monkeypatch.setattr(checking, "inspect", fail)
    before = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    listen()
    try:
        found = run("inspect", "x")
    finally:
        for one, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
            signal.signal(one, handler)
    assert (found.code, found.err) == (128 + signal.SIGTERM, "surgery: interrupted\n")


def test_control_characters_of_names_are_escaped(run: Run, base: Path, adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / f"out{CONTROLS}"
    assert printed(out) in told(run("inspect", out), 3)
    merged = run("merge", base, adapter, out, "--reversible")
    back = run("unmerge", out, tmp_path / f"back{CONTROLS}")
    for found in (merged, back):
        assert (found.code, found.err) == (0, "")
        assert found.out[:-1].isprintable()
    told(run("merge", base, adapter, out), 6)
    rewrite(out / "model.safetensors", {f"a{CONTROLS}.weight": torch.ones(2, 2)})
    assert all(line.isprintable() for line in run("inspect", out).out.split("\n"))
    listed = json.loads(run("inspect", out, "--json").out)["rows"]
    assert f"a{CONTROLS}" in [row["name"] for row in listed]


def printed(name: object) -> str:
    return str(name).encode("unicode_escape").decode("ascii")


def _b(site: str) -> dict[str, torch.Tensor]:
    return {f"{site}.lora_B.weight": torch.ones(6, 4)}


@pytest.mark.parametrize("digest", ["1234", "x" * 64, ""])
@pytest.mark.parametrize("option", ["--expect-base-sha256", "--expect-adapter-sha256"])
def test_a_hash_that_is_none_is_a_usage_error(
    option: str, digest: str, run: Run, base: Path, adapter: Path, tmp_path: Path
) -> None:
    assert "64 hexadecimal digits" in told(run("merge", base, adapter, tmp_path / "out", option, digest), 2)
    assert not (tmp_path / "out").exists()


def test_a_weight_that_is_no_number_is_named(run: Run, base: Path, adapter: Path, tmp_path: Path) -> None:
    assert "its weight is 'abc'" in told(run("merge", base, f"{adapter}=abc", tmp_path / "out"), 2)


def test_an_op_that_does_not_fit_is_named(run: Run, base: Path, adapter: Path, tmp_path: Path) -> None:
    found = told(run("merge", base, adapter, tmp_path / "out", "--op", "up_proj=conv1d"), 3)
    assert "leave --op out" in found


def test_a_note_stands_on_stderr_and_stops_nothing(run: Run, base: Path, tmp_path: Path) -> None:
    """The adapter was trained on a base in another dtype, of which no hash can be compared."""
    adapter = write_adapter(tmp_path / "adapter")
    name = "model.layers.0.q_proj.weight"
    told_of = {name: (TensorInfo(name, torch.float32, (6, 6)), "0" * 64)}
    (adapter / "surgery.base.json").write_bytes(base_print_bytes(told_of))
    found = run("merge", base, adapter, tmp_path / "out")
    assert found.code == 0
    assert found.err.startswith("surgery: note: ")
    assert "trained on a base in float32, this one is in bfloat16" in found.err
