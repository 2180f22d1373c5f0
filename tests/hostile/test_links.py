"""Links: inside a folder and in the Hub's cache they are followed; one that leads out of the folder is refused."""

import os
import shutil
from pathlib import Path

import pytest
from damages import BASE_CONFIG, CONFIG, INDEX, SHARD, TENSORS
from merging import merged, refuses
from outsides import out_of

import surgery
from surgery.errors import FormatError
from surgery.io.regular import contained

FILES = (SHARD, INDEX, BASE_CONFIG, CONFIG, TENSORS)


def cached(folder: Path, kind: str) -> Path:
    """What lies in `folder / kind` as the Hub's cache keeps it; the snapshot is what its link leads to."""
    repo = folder / "cache" / f"models--{kind}--x"
    snapshot = repo / "snapshots" / "0123abc"
    (repo / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted((folder / kind).iterdir())):
        path.rename(repo / "blobs" / f"{kind}{number}")
        (snapshot / path.name).symlink_to(f"../../blobs/{kind}{number}")
    (folder / kind).rmdir()
    (folder / kind).symlink_to(snapshot)
    return repo


@pytest.mark.parametrize("file", FILES)
def test_a_link_out_of_the_folder_is_refused_with_the_next_step(
    folder: Path, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out_of(file)(folder)
    line = refuses(folder, capsys)
    assert f"{folder / file}: a link that leads out of its folder, to {folder / 'elsewhere'}" in line
    assert line.endswith("put a copy there\n")
    shutil.copy(folder / "elsewhere" / Path(file).name, folder / "copy")
    (folder / "copy").replace(folder / file)
    assert not merged(folder)


def test_a_link_in_a_snapshot_of_the_hub_is_followed_to_its_own_blobs(folder: Path) -> None:
    (folder / "adapter/tokenizer.json").write_text("{}")
    for kind in ("base", "adapter"):
        cached(folder, kind)
    assert not merged(folder)
    assert surgery.verify_checkpoint(folder / "base", folder / "adapter", folder / "out").ok
    assert not any(path.is_symlink() for path in (folder / "out").iterdir())


@pytest.mark.parametrize("target", ["../../../models--adapter--x/blobs/other", "../../refs/x", "../../blobs/../x"])
def test_a_link_in_a_snapshot_to_anything_else_is_refused(
    folder: Path, target: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for kind in ("base", "adapter"):
        cached(folder, kind)
    snapshot = (folder / "base").resolve()
    path = Path(os.path.normpath(snapshot / target))
    path.parent.mkdir(exist_ok=True)
    path.write_text("{}")
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(target)
    assert "leads out of its folder" in refuses(folder, capsys)


@pytest.mark.parametrize("file", ["record.json", "streams-0", "adapter-0.tensors", "adapter-0.json", "../notes.txt"])
def test_a_link_out_of_a_merged_folder_is_not_followed_by_an_unmerge(folder: Path, file: str) -> None:
    (folder / "base/notes.txt").write_text("as they were")
    surgery.merge_checkpoint(folder / "base", folder / "adapter", folder / "out", reversible=True)
    out_of(f"out/surgery.undo/{file}")(folder)
    with pytest.raises(FormatError, match="leads out of its folder"):
        surgery.unmerge_checkpoint(folder / "out", folder / "back")
    assert not (folder / "back").exists()


@pytest.mark.parametrize("file", ["surgery.receipt.json", "notes.txt"])
def test_a_link_out_of_a_merged_folder_is_not_followed_by_verify(folder: Path, file: str) -> None:
    (folder / "base/notes.txt").write_text("as they were")
    surgery.merge_checkpoint(folder / "base", folder / "adapter", folder / "out")
    out_of(f"out/{file}")(folder)
    with pytest.raises(FormatError, match="leads out of its folder"):
        surgery.verify_checkpoint(folder / "out")


def test_a_folder_may_itself_be_reached_through_links(folder: Path) -> None:
    for kind in ("base", "adapter"):
        (folder / kind).rename(folder / f"real-{kind}")
        (folder / f"link-{kind}").symlink_to(f"real-{kind}")
        (folder / kind).symlink_to(folder / f"link-{kind}")
    assert not merged(folder)
    assert surgery.verify_checkpoint(folder / "out").ok


def test_a_file_that_is_named_may_be_a_link_to_anywhere(folder: Path) -> None:
    out_of(TENSORS)(folder)
    surgery.merge_checkpoint(folder / "base", folder / TENSORS, folder / "out")
    assert surgery.verify_checkpoint(folder / "base", folder / TENSORS, folder / "out").ok


def test_a_folder_whose_name_begins_like_another_is_not_inside_it(tmp_path: Path) -> None:
    for name in ("base", "base2"):
        (tmp_path / name).mkdir()
    (tmp_path / "base2/x").write_text("")
    (tmp_path / "base/x").symlink_to("../base2/x")
    with pytest.raises(FormatError, match="leads out"):
        contained(tmp_path / "base", "x")
    (tmp_path / "base/y").symlink_to("../base/z")
    assert contained(tmp_path / "base", "y") == tmp_path / "base/y"
