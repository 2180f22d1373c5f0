"""Names in any script: letters are printed as they are, and escaped where the terminal has no such letters."""

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoint_folders import llama_base, rewrite, write_adapter
from hypothesis import given, settings
from hypothesis import strategies as st
from outcomes import Outcome, Run

from surgery.cli import main
from surgery.errors import printable

NAME = "größe модель 模型 모델 نموذج e\u0301"
ASCII = NAME.encode("ascii", "backslashreplace").decode()
ESCAPE = re.compile(r"\\(\\|[nrt]|x..|u....|U.{8})")
UNSEEN = (
    *(chr(one) for one in (*range(32), 0x7F, 0x85, 0xA0, 0xAD)),
    *"\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u180e\u180f\u200b\u200c\u200d\u200e\u200f\u2028\u2029",
    *"\u202a\u202b\u202c\u202d\u202e\u2060\u2061\u2066\u2067\u2068\u2069\u2800\u3000\u3164\ud800\udcff\ue000",
    *"\ufe00\ufe0f\ufeff\uffa0\ufff9\ufffe\uffff\U0001d159\U000e0001\U000e0041\U000e0100\U000e01ef",
)


@pytest.mark.parametrize("char", UNSEEN)
def test_what_is_not_seen_is_escaped(char: str) -> None:
    text = printable(f"a{char}b")
    assert text == f"a{char.encode('unicode_escape').decode()}b"
    assert text.isascii()
    assert text.isprintable()


def test_letters_stay() -> None:
    assert printable(NAME) == NAME
    assert printable("a\\u043c") == "a\\\\u043c"  # and are not taken for escapes
    assert printable("м" * 200) == "м" * 200
    assert printable("м" * 201) == "м" * 197 + "..."


@settings(deadline=None)
@given(st.text(max_size=20))
def test_each_name_is_told_from_every_other(name: str) -> None:
    text = printable(name)
    assert text.isprintable()
    assert ESCAPE.sub(lambda found: found[0].encode().decode("unicode_escape"), text) == name


def named(folder: Path) -> tuple[Path, Path, Path]:
    """A base with a tensor of that name, an adapter, and where the output goes; in a folder of that name."""
    base, adapter = llama_base(folder / NAME / "base"), write_adapter(folder / NAME / "adapter")
    rewrite(base / "model.safetensors", {f"{NAME}.weight": torch.ones(2, 2)})
    return base, adapter, folder / NAME / "out"


def calls(base: Path, adapter: Path, out: Path) -> list[tuple[int, str, list[object]]]:
    """The exit code of a command, what it shows after the folder's name, and its arguments."""
    return [
        (0, "/adapter by", ["plan", base, adapter, f"{adapter}=0.5"]),
        (0, "/out: 4 tensors changed", ["merge", base, adapter, out, "--reversible"]),
        (0, "", ["inspect", out]),
        (4, "", ["diff", base.parent.parent / "other", out, "--exit-code"]),
        (0, "/back: 2 files", ["unmerge", out, out.with_name("back")]),
        (6, "/out: it exists", ["merge", base, adapter, out]),
        (3, "/none: no such", ["inspect", out.with_name("none")]),
        (2, "/adapter: its weight is 'nan'", ["merge", base, f"{adapter}=nan", out]),
        (2, "", ["inspect", f"--{NAME}"]),
    ]


def test_letters_are_printed_as_they_are(run: Run, tmp_path: Path) -> None:
    llama_base(tmp_path / "other")
    for code, shown, argv in calls(*named(tmp_path)):
        found = run(*argv)
        assert found.code == code, found
        assert f"{NAME}{shown}" in found.out + found.err


def test_a_stream_without_the_letters_gets_them_escaped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llama_base(tmp_path / "other")
    for code, shown, argv in calls(*named(tmp_path)):
        found = streamed(monkeypatch, argv)
        assert found.code == code, found
        assert f"{ASCII}{shown}" in found.out + found.err


def streamed(monkeypatch: pytest.MonkeyPatch, argv: list[object], encoding: str = "ascii") -> Outcome:
    """A call whose streams have this encoding, and refuse what it lacks."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding, write_through=True) for _ in range(2))
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", out)
        patched.setattr(sys, "stderr", err)
        with pytest.raises(SystemExit) as stopped:
            main(list(map(str, argv)))
    texts = (one.buffer.getvalue().decode(encoding) for one in (out, err))  # type: ignore[attr-defined]
    return Outcome(stopped.value.code or 0, *texts)  # type: ignore[arg-type]


def test_what_a_stream_has_stays_beside_what_it_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = streamed(monkeypatch, ["inspect", tmp_path / "größe 모"], "latin-1")
    assert "größe \\ubaa8: no such" in found.err


BOTH = """
import sys
from surgery.cli import main

codes = []
for path in sys.argv[1:]:
    try:
        main(["inspect", path])
    except SystemExit as ended:
        codes.append(ended.code or 0)
raise SystemExit(codes != [0, 3])
"""  # what is listed and what is refused, in one process


@pytest.mark.parametrize(
    "environment", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}]
)
def test_the_command_line_on_an_ascii_terminal_escapes_what_it_names(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    base, _, out = named(tmp_path)
    command = [sys.executable, "-c", BOTH, str(base), str(out)]
    done = subprocess.run(command, env={**os.environ, **environment}, check=False, capture_output=True)
    assert done.returncode == 0, done
    assert ASCII.encode() in done.stdout
    assert b": no such file" in done.stderr
    assert (done.stdout + done.stderr).isascii()


def test_what_the_demo_prints_by_itself_is_escaped_too() -> None:
    code = (
        "import runpy, sys; from surgery.cli import main; sys.argv = ['surgery', 'demo']; "
        f"runpy.run_path = lambda _: {{'run': lambda _: print({NAME!r})}}; main()"
    )
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], env=env, check=False, capture_output=True)
    assert (done.returncode, done.stdout.decode().strip(), done.stderr) == (0, ASCII, b"")
