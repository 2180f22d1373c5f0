"""Paths that could be meant and are not: each command says in one line what lies there, and what to name instead."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from outcomes import Run

Made = Callable[[Path, Path, Path], Path]


def file(name: str, content: bytes = b"print(1)\n") -> Made:
    def made(folder: Path, base: Path, adapter: Path) -> Path:
        del base, adapter
        (folder / name).write_bytes(content)
        return folder / name

    return made


def holding(*names: str) -> Made:
    """A folder with these files, as base or adapter have them, or of some bytes."""

    def made(folder: Path, base: Path, adapter: Path) -> Path:
        found = folder / "found"
        found.mkdir()
        for name in names:
            source = next((one / name for one in (base, adapter) if (one / name).is_file()), None)
            (found / name).write_bytes(b"\x08\x07" if source is None else source.read_bytes())
        return found

    return made


def within(folder: Path, base: Path, adapter: Path) -> Path:
    del base
    shutil.copytree(adapter, folder / "run" / "default")
    return folder / "run"


# What lies there, and what each command that looks for a model or an adapter has to say.
PLACES: Mapping[str, tuple[Made, str]] = {
    "a program": (file("train.py"), "no safetensors file; a model's folder or .safetensors file"),
    "a config of a model": (lambda _, base, __: base / "config.json", "it is the config of a model; name the folder"),
    "a config of an adapter": (lambda *given: given[2] / "adapter_config.json", "it is the config of an adapter; name"),
    "a receipt": (file("surgery.receipt.json", b"{}"), "it is the receipt of a merge; name the folder"),
    "a graph": (file("model.onnx"), "it is an ONNX graph; `surgery verify` takes the folder"),
    "a pickle": (file("pytorch_model.bin"), "a pickle, which can run code"),
    "GGUF": (file("model.gguf"), "it is GGUF, which is not read; name the safetensors"),
    "an empty folder": (holding(), "an empty folder; a model's folder"),
    "a config alone": (holding("config.json"), "config.json and no safetensors; copy it again, whole"),
    "an adapter's config alone": (holding("adapter_config.json"), "adapter_config.json and no safetensors; copy it"),
    "a graph alone": (holding("model.onnx"), "no safetensors, but model.onnx, an ONNX graph; "),
    "pickles": (holding("config.json", "pytorch_model.bin"), "no safetensors, but pytorch_model.bin, a pickle"),
    "a folder of folders": (within, "no safetensors in it; name one of its sub-folders: default"),
}
# Where X is looked for; OUT is new.
READ: Mapping[str, str] = {
    "inspect": "inspect X",
    "plan, base": "plan X ADAPTER",
    "plan, adapter": "plan BASE X",
    "merge, base": "merge X ADAPTER OUT",
    "merge, adapter": "merge BASE X OUT",
    "verify, base": "verify X ADAPTER BASE",
    "verify, adapter": "verify BASE X BASE",
    "verify, out": "verify BASE ADAPTER X",
    "combine": "combine ADAPTER X OUT",
    "extract, base": "extract X BASE OUT --rank 1",
    "extract, tuned": "extract BASE X OUT --rank 1",
    "diff": "diff BASE X",
    "export, base": "export X OUT",
    "export, adapter": "export BASE X OUT",
}


@pytest.mark.parametrize("line", READ.values(), ids=READ.keys())
def test_a_path_to_something_else_is_told_as_what_it_is(
    line: str, run: Run, base: Path, adapter: Path, tmp_path: Path
) -> None:
    for name, (made, told) in PLACES.items():
        shutil.rmtree(tmp_path / "there", ignore_errors=True)
        (tmp_path / "there").mkdir()
        words = {
            "X": made(tmp_path / "there", base, adapter),
            "BASE": base,
            "ADAPTER": adapter,
            "OUT": tmp_path / "out",
        }
        found = run(*(words.get(word, word) for word in line.split()))
        assert (found.code, found.err.count("\n")) == (3, 1), (name, found)
        assert told in found.err, (name, found)
        assert not (tmp_path / "out").exists()


def test_all_values_that_an_option_takes_are_told(run: Run, base: Path, adapter: Path, tmp_path: Path) -> None:
    found = run("merge", str(base), str(adapter), str(tmp_path / "out"), "--into", "nothing")
    assert (found.code, found.err.count("\n")) == (2, 1)
    assert "torchao-fp8 is wanted" in found.err


# What a folder that is one thing is not.
OTHERS: Mapping[str, tuple[str, str]] = {
    "a model for an adapter": (
        "merge BASE BASE OUT",
        "it looks like a model; an adapter is wanted; a merge names BASE first",
    ),
    "a model to combine": ("combine ADAPTER BASE OUT", "it looks like a model; an adapter is wanted"),
    "an adapter for a model": (
        "merge ADAPTER ADAPTER OUT",
        "it is an adapter; a model is wanted; a merge names BASE first",
    ),
    "an adapter for a merge": ("verify BASE ADAPTER ADAPTER", "it is an adapter; a model is wanted"),
    "an adapter to compare": ("diff BASE ADAPTER", "it is an adapter; a model is wanted"),
    "an adapter for a tuned model": ("extract BASE ADAPTER OUT --rank 1", "it is an adapter; a model is wanted"),
    "a model to check alone": ("verify BASE", "give base and adapter too"),
    "an adapter to check alone": ("verify ADAPTER", "it is an adapter"),
    "a model that no merge made": ("unmerge BASE OUT", "only a merge made with --reversible can be unmerged"),
    "an adapter to unmerge": ("unmerge ADAPTER OUT", "it is an adapter; a model is wanted"),
    "a config to check": ("verify BASE/config.json", "it is the config of a model; name the folder"),
    "a config to unmerge": ("unmerge BASE/config.json OUT", "it is the config of a model; name the folder"),
    "a model to push": ("push BASE me/there", "no surgery.receipt.json in it; "),
}


@pytest.mark.parametrize(
    "line", ["merge FIRST SECOND OUT", "plan FIRST SECOND", "verify FIRST SECOND BASE", "export FIRST SECOND OUT"]
)
@pytest.mark.parametrize("first", ["ADAPTER", "ADAPTER/adapter_model.safetensors", "ADAPTER with a config.json"])
@pytest.mark.parametrize("second", ["BASE", "BASE/model.safetensors", "BASE=0.5"])
def test_an_adapter_before_its_base_is_told_with_the_order(
    line: str, first: str, second: str, run: Run, base: Path, adapter: Path, tmp_path: Path
) -> None:
    if first.endswith("config.json"):
        shutil.copy(base / "config.json", adapter)
    paths = {"ADAPTER": adapter, "BASE": base, "OUT": tmp_path / "out"}
    head, tail = first.partition(" with ")[0], second
    words = {name: str(path) for name, path in paths.items()}
    words |= {"FIRST": head.replace("ADAPTER", str(adapter)), "SECOND": tail.replace("BASE", str(base))}
    found = run(*(words.get(word, word) for word in line.split()))
    assert (found.code, found.err.count("\n")) == (3, 1), found
    model = words["SECOND"].removesuffix("=0.5")
    assert f"{words['FIRST']}: it is an adapter, and {model} a model; BASE comes first; swap the two" in found.err
    assert not (tmp_path / "out").exists()


def test_an_adapter_with_a_model_beside_it_may_be_the_base(run: Run, base: Path, adapter: Path) -> None:
    for path in adapter.iterdir():
        shutil.copy(path, base)
    assert run("plan", base, adapter).code == 0
    assert "it is an adapter" not in run("plan", base, base / "model.safetensors").err


@pytest.mark.parametrize("line", ["plan LONG ADAPTER", "plan ADAPTER LONG", "merge LONG LONG OUT"])
def test_a_name_too_long_to_be_one_is_not_looked_into(line: str, run: Run, adapter: Path, tmp_path: Path) -> None:
    words = {"LONG": tmp_path / ("x" * 300), "ADAPTER": adapter, "OUT": tmp_path / "out"}
    found = run(*(words.get(word, word) for word in line.split()))
    assert (found.code, found.err.count("\n")) == (3, 1), found


@pytest.mark.parametrize(("line", "told"), OTHERS.values(), ids=OTHERS.keys())
def test_one_kind_of_folder_in_the_place_of_another_is_told(
    line: str, told: str, run: Run, base: Path, adapter: Path, tmp_path: Path
) -> None:
    words = {"BASE": base, "BASE/config.json": base / "config.json", "ADAPTER": adapter, "OUT": tmp_path / "out"}
    found = run(*(words.get(word, word) for word in line.split()))
    assert (found.code, found.err.count("\n")) == (3, 1), found
    assert told in found.err
    assert not (tmp_path / "out").exists()


HUB_PAGES = [
    ("https://huggingface.co/owner/name", "owner/name"),
    ("http://www.huggingface.co/owner/name/", "owner/name"),
    ("huggingface.co/owner/name", "owner/name"),
    ("https://hf.co/owner/name?library=peft", "owner/name"),
    ("hf://owner/name@v1", "owner/name@v1"),
    ("https://huggingface.co/owner/name.v1.git", "owner/name.v1"),
    ("https://huggingface.co/owner/name/tree/main", "owner/name@main"),
    ("https://huggingface.co/owner/name/blob/abc123/model.safetensors", "owner/name@abc123"),
]


@pytest.mark.parametrize(("page", "spelled"), HUB_PAGES)
def test_an_address_of_the_hub_is_told_as_the_id_that_it_is_of(
    page: str, spelled: str, run: Run, base: Path, adapter: Path, tmp_path: Path
) -> None:
    for line in (
        ["inspect", page],
        ["merge", base, page, tmp_path / "out"],
        ["merge", page, adapter, tmp_path / "out"],
    ):
        found = run(*line)
        assert (found.code, found.err.count("\n")) == (3, 1)
        assert found.err.endswith(f"an address; a path or owner/name[@revision] is wanted, here {spelled}\n"), found.err


@pytest.mark.parametrize(
    "address",
    ["https://example.com/owner/name.git/x", "s3://bucket", "https://huggingface.co", "hf://datasets/owner/name"],
)
def test_another_address_is_no_id(address: str, run: Run) -> None:
    assert "no such file or folder; a path or owner/name[@revision] is wanted" in run("inspect", address).err


@pytest.mark.usefixtures("base", "adapter")
def test_a_quoted_home_folder_is_that_of_the_user_for_what_is_written_too(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run("merge", "~/base", "~/adapter", "~/out", "--reversible").code == 0
    assert run("verify", "~/base", "~/adapter=1", "~/out", "--report", "~/report.md").code == 0
    assert run("unmerge", "~/out/", "~/restored").code == 0
    assert run("combine", "~/adapter", "~/combined").code == 0
    assert {"out", "restored", "combined", "report.md"} <= {path.name for path in tmp_path.iterdir()}
    assert list(Path.cwd().iterdir()) == []
    assert "~nobody-of-this-name/x: no such file or folder" in run("inspect", "~nobody-of-this-name/x").err


def test_a_merge_does_not_replace_an_adapter_that_stands_where_out_is_wanted(
    run: Run, base: Path, adapter: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(adapter, tmp_path / "other")
    for more in ((), ("--overwrite",)):
        found = run("merge", base, adapter, other, *more)
        assert (found.code, found.err) == (6, f"surgery: {other}: it is an adapter, not OUT; name a new folder last\n")
    assert sorted(path.name for path in other.iterdir()) == sorted(path.name for path in adapter.iterdir())


def test_a_new_folder_that_is_named_as_the_file_of_an_adapter_is_none(
    run: Run, base: Path, adapter: Path, tmp_path: Path
) -> None:
    out = tmp_path / "adapter_model.safetensors"
    for line in (["merge", base, adapter, out], ["verify", out], ["verify", base, adapter, out], ["inspect", out]):
        assert run(*line).code == 0, line
    assert "adapter_model.safetensors: no such file" in run("inspect", tmp_path / "other" / out.name).err


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("merge BASE ADAPTER", "too few arguments; `surgery merge BASE ADAPTER[=WEIGHT]... OUT` is wanted"),
        ("unmerge BASE", "too few arguments; `surgery unmerge OUT BASE_OUT` is wanted"),
        ("merge BASE ADAPTER 0.5 OUT", "0.5: no adapter; a weight stands with its own, such as ADAPTER=0.5"),
    ],
)
def test_arguments_that_are_amiss_are_told_with_those_that_are_wanted(
    line: str, told: str, run: Run, base: Path, adapter: Path, tmp_path: Path
) -> None:
    words = {"BASE": base, "ADAPTER": adapter, "OUT": tmp_path / "out"}
    found = run(*(words.get(word, word) for word in line.split()))
    assert (found.code, found.err.count("\n")) == (2, 1)
    assert told in found.err
    assert not (tmp_path / "out").exists()


def test_an_output_that_exists_is_told_with_the_option(run: Run, base: Path, adapter: Path, tmp_path: Path) -> None:
    assert run("merge", base, adapter, tmp_path / "out").code == 0
    found = run("merge", base, adapter, tmp_path / "out")
    assert (found.code, found.err.partition("; ")[2]) == (6, "a new folder is wanted; or give --overwrite\n")
