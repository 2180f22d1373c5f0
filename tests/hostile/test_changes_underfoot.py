"""A shard that is cut, edited or replaced while it is merged: exit code 3, and no output, at whatever moment."""

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import surgery
from surgery.api.given import weighted
from surgery.cli import main
from surgery.errors import InputError
from surgery.hosts.checkpoint import Checkpoint
from surgery.io import disk
from surgery.io.octets import tensor_from
from surgery.io.strict_json import json_bytes
from surgery.io.tensor_file import _COARSE_CLOCK, TensorFile
from surgery.procedures.writing import merge_checkpoint as merging
from surgery.procedures.writing.filling import Pace

ROWS = 64


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A base of one weight of many rows, between two that no adapter touches."""
    torch.manual_seed(0)
    tensors = {"a": torch.randn(200), "m.weight": torch.randn(ROWS, 8), "z": torch.randn(200)}
    (tmp_path / "base").mkdir()
    save_file(tensors, tmp_path / "base/model.safetensors")
    (tmp_path / "adapter").mkdir()
    pair = {"m.lora_A.weight": torch.randn(2, 8), "m.lora_B.weight": torch.randn(ROWS, 2)}
    save_file(
        {f"base_model.model.{name}": v for name, v in pair.items()}, tmp_path / "adapter/adapter_model.safetensors"
    )
    config = surgery.LoraConfig(r=2, target_modules=["m"]).to_json()
    (tmp_path / "adapter/adapter_config.json").write_bytes(json_bytes(config))
    return tmp_path


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 100)


def grow(path: Path) -> None:
    os.truncate(path, path.stat().st_size + 100)


def edit(path: Path) -> None:
    """One byte of the data, in place, and the same size."""
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))


def edit_and_backdate(path: Path) -> None:
    """As if nothing had been written: the time of change alone tells."""
    before = path.stat()
    edit(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def rewrite(path: Path) -> None:
    """The same bytes, in place: who knows what was read between."""
    path.write_bytes(path.read_bytes())


def replace(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    other.rename(path)


def remove(path: Path) -> None:
    path.unlink()


CHANGES = [truncate, grow, edit, edit_and_backdate, rewrite, replace, remove]


def merged(folder: Path) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(["merge", str(folder / "base"), str(folder / "adapter"), str(folder / "out")])
    return int(stopped.value.code or 0)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("at", [1, 2, 5, 64])
def test_a_change_between_two_tiles_is_refused(
    folder: Path, change: Callable[[Path], None], at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def read(*given: object) -> torch.Tensor:
        calls.append(given)
        if len(calls) == at:
            change(folder / "base/model.safetensors")
        return tensor_from(*given)  # type: ignore[arg-type]

    monkeypatch.setattr("surgery.hosts.checkpoint.tensor_from", read)
    monkeypatch.setattr(Pace, "__init__", _small_tiles(Pace.__init__))
    assert merged(folder) == 3
    assert len(calls) >= at
    assert sorted(path.name for path in folder.iterdir()) == ["adapter", "base"]


def _small_tiles(init: Callable) -> Callable:
    def made(self: object, *given: object, **named: object) -> None:
        init(self, *given, **{**named, "tile_elements": 8})

    return made


class Changer(threading.Thread):
    """Changes the file after a while."""

    def __init__(self, change: Callable[[Path], None], path: Path, delay_s: float) -> None:
        super().__init__()
        self.change, self.path, self.delay_s, self.done_ns = change, path, delay_s, 0

    def run(self) -> None:
        time.sleep(self.delay_s)
        self.change(self.path)
        self.done_ns = time.time_ns()


@pytest.mark.parametrize("change", CHANGES)
def test_a_thread_that_changes_the_shard_is_always_found_out(folder: Path, change: Callable[[Path], None]) -> None:
    """At some moment or other: a merge that ends well has ended before the change."""
    path = folder / "base/model.safetensors"
    sound = path.read_bytes()
    for attempt in range(12):
        path.write_bytes(sound)
        changer = Changer(change, path, attempt / 400)
        with Checkpoint(folder / "base") as base:
            changer.start()
            try:
                options = merging.Options(pace=Pace(tile_elements=8, workers=1))
                merging.merge_checkpoint(base, weighted(folder / "adapter"), folder / "out", options)
            except InputError:
                assert not (folder / "out").exists()
            else:
                checked_ns = (folder / "out/surgery.receipt.json").stat().st_mtime_ns
                changer.join()
                assert changer.done_ns > checked_ns - 10_000_000  # a tick of the clock that stamps files
            changer.join()
        _clear(folder / "out")


def _clear(out: Path) -> None:
    for path in sorted(out.rglob("*"), reverse=True):
        path.unlink()
    if out.exists():
        out.rmdir()


@pytest.mark.parametrize("change", [edit, rewrite])
def test_a_change_within_a_tick_of_the_clock_is_seen(folder: Path, change: Callable[[Path], None]) -> None:
    path = folder / "base/model.safetensors"
    for _ in range(50):
        change(path)  # the file is as young as can be when it is opened
        file = TensorFile(path)
        change(path)
        with pytest.raises(InputError, match="changed while it was read"):
            file.check_unchanged()
        file.close()


def test_a_file_is_read_once_it_is_older_than_a_tick(folder: Path) -> None:
    """Where the clock that stamps files is coarse, this is what makes a change within a tick be seen."""
    path = folder / "base/model.safetensors"
    edit(path)
    TensorFile(path).close()
    assert time.time_ns() - path.stat().st_ctime_ns > 2e9 * time.clock_getres(_COARSE_CLOCK)


def test_a_link_that_leads_to_another_file_meanwhile_is_refused(folder: Path) -> None:
    """As in the Hub's cache when a snapshot is downloaded anew: neither file has changed."""
    first, path = folder / "base/first", folder / "base/model.safetensors"
    path.rename(first)
    (folder / "base/second").write_bytes(first.read_bytes())
    path.symlink_to("first")
    file = TensorFile(path)
    file.check_unchanged()
    path.unlink()
    path.symlink_to("second")
    with pytest.raises(InputError, match="changed while it was read"):
        file.check_unchanged()
    file.close()


def test_an_adapter_that_changes_while_it_is_read_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*given: object) -> torch.Tensor:
        edit(folder / "adapter/adapter_model.safetensors")
        return tensor_from(*given)  # type: ignore[arg-type]

    monkeypatch.setattr("surgery.adapters.peft.tensor_from", read)
    assert merged(folder) == 3


@pytest.mark.parametrize("max_shard_bytes", [None, 900])
def test_an_adapter_that_goes_away_while_it_is_merged_is_refused(
    folder: Path, max_shard_bytes: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a file that is not there, though its error is one of the system's kind; no shard is kept to go on from."""
    create = disk.create

    def created(path: Path) -> int:
        if "safetensors" in path.name:  # that of `a`, which no adapter touches
            (folder / "adapter/adapter_model.safetensors").unlink(missing_ok=True)
        return create(path)

    monkeypatch.setattr(disk, "create", created)
    options = merging.Options(max_shard_bytes=max_shard_bytes, pace=Pace(workers=1))
    with Checkpoint(folder / "base") as base, pytest.raises(InputError, match="cannot be opened"):
        merging.merge_checkpoint(base, weighted(folder / "adapter"), folder / "out", options)
    assert sorted(path.name for path in folder.iterdir()) == ["adapter", "base"]
