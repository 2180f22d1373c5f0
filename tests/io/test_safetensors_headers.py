"""A zoo of bad safetensors files: each is refused with FormatError, and all that the library refuses, we refuse."""

import json
import os
import re
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import safetensors
import torch
from bad_files import DATA, SOUND, SOUNDS, ZOO, entry, spelled
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import Tensor

from surgery.errors import AbsentError, FormatError, InputError
from surgery.io import tensor_file
from surgery.io.header import DTYPES, SPELLINGS, Header, encode_header, header_length, parse_header
from surgery.io.octets import octets, tensor_from
from surgery.io.tensor_file import TensorFile

each_of_the_zoo = pytest.mark.parametrize("data", ZOO.values(), ids=ZOO.keys())


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[None]:
    """A read that blocks or drags on ends the test after 10 seconds."""

    def stop(*_: object) -> None:
        raise AssertionError("10 seconds, and no answer")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(10)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def parsed(data: bytes) -> Header:
    length = header_length(data[:8], len(data), "file")
    return parse_header(data[:length], len(data), "file")


def opened() -> set[str]:
    """What this process holds open."""
    found = set()
    for number in os.listdir("/proc/self/fd"):  # noqa: PTH208  # a generator would hold one itself
        with suppress(OSError):  # closed meanwhile, by another thread
            found.add(os.readlink(f"/proc/self/fd/{number}"))  # noqa: PTH115
    return found


def refusal(path: Path, kind: type[InputError] = FormatError) -> str:
    """What is said of the file; it must be one short line, and no descriptor may be left open."""
    with pytest.raises(kind) as raised:
        TensorFile(path)
    assert raised.type is kind
    assert os.path.realpath(path) not in opened()  # also of a link to itself
    message = str(raised.value)
    assert message.isprintable()
    assert message.startswith(str(path))
    return message


def library_refuses(path: Path) -> bool:
    try:
        with safetensors.safe_open(path, "pt") as file:
            list(file.keys())
    except safetensors.SafetensorError:
        return True
    return False


@each_of_the_zoo
def test_a_bad_file_is_refused_in_one_short_line(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(data)
    assert len(refusal(path)) < len(str(path)) + 600


@pytest.mark.parametrize("data", SOUNDS.values(), ids=SOUNDS.keys())
def test_a_sound_file_is_accepted(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(data)
    TensorFile(path).close()
    assert not library_refuses(path)


@pytest.mark.parametrize("data", (ZOO | SOUNDS).values(), ids=(ZOO | SOUNDS).keys())
def test_what_the_library_refuses_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(data)
    if library_refuses(path):
        refusal(path)


def pipe(path: Path) -> None:
    os.mkfifo(path)


def folder(path: Path) -> None:
    path.mkdir()


def link_to_folder(path: Path) -> None:
    path.symlink_to(path.parent)


def link_to_pipe(path: Path) -> None:
    os.mkfifo(path.with_name("pipe"))
    path.symlink_to("pipe")


def link_to_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def nothing(path: Path) -> None:
    assert not path.exists()


def link_to_nothing(path: Path) -> None:
    path.symlink_to("nothing")


def link_to_itself(path: Path) -> None:
    path.symlink_to(path)


def listener(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(str(path))


@pytest.mark.parametrize("make", [pipe, folder, link_to_folder, link_to_pipe, link_to_device])
def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "a.safetensors")
    assert "not a regular file" in refusal(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("make", "kind"),
    [(nothing, AbsentError), (link_to_nothing, AbsentError), (link_to_itself, InputError), (listener, InputError)],
)
def test_what_cannot_be_opened_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable, kind: type[InputError]
) -> None:
    monkeypatch.chdir(tmp_path)  # the name of a socket is short
    make(Path("a.safetensors"))
    assert "cannot be opened" in refusal(Path("a.safetensors"), kind)


@pytest.mark.parametrize("chunk_bytes", [1, 7, 24, 1 << 22])
def test_chunks_are_the_bytes_of_one_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int) -> None:
    monkeypatch.setattr(tensor_file, "CHUNK_BYTES", chunk_bytes)
    (tmp_path / "a.safetensors").write_bytes(SOUND)
    file = TensorFile(tmp_path / "a.safetensors")
    chunks = {name: list(file.chunks(entry)) for name, entry in file.entries.items()}
    assert {name: b"".join(held) for name, held in chunks.items()} == {"a": DATA[:24], "b": DATA[24:]}
    assert max(len(chunk) for held in chunks.values() for chunk in held) == min(chunk_bytes, 24)
    assert file.read(file.entries["a"].start + 3, 5) == DATA[3:8]
    file.check_unchanged()
    file.close()


def test_a_file_that_changes_while_it_is_open_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(SOUND)
    file = TensorFile(path)
    path.write_bytes(SOUND[:-1])
    with pytest.raises(InputError, match="became shorter"):
        file.read(file.entries["b"].start, 8)
    with pytest.raises(InputError, match="changed while it was read"):
        file.check_unchanged()
    path.write_bytes(SOUND)
    os.utime(path, ns=(0, 0))
    with pytest.raises(InputError, match="changed while it was read"):
        file.check_unchanged()
    file.close()


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Any bytes, in any dtype and shape."""
    dtype = draw(st.sampled_from([dtype for dtype in DTYPES.values() if isinstance(dtype, torch.dtype)]))
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    count = torch.Size(shape).numel()
    size = count * dtype.itemsize
    data = draw(st.binary(min_size=size, max_size=size))
    if dtype == torch.bool:
        data = bytes(byte & 1 for byte in data)
    return torch.frombuffer(bytearray(data), dtype=dtype).view(shape) if count else torch.empty(shape, dtype=dtype)


names = st.text(st.characters(codec="utf-8"), max_size=8)
files = st.dictionaries(names.filter(lambda name: name != "__metadata__"), tensors(), max_size=5)
notes = st.none() | st.dictionaries(names, names, min_size=1, max_size=3)  # save({}, {}) writes no JSON


@settings(deadline=None)
@given(held=files, told=notes)
def test_a_file_of_the_library_is_read_as_it_was_meant(
    tmp_path_factory: pytest.TempPathFactory, held: dict[str, Tensor], told: dict[str, str] | None
) -> None:
    path = tmp_path_factory.mktemp("file") / "a.safetensors"
    path.write_bytes(save(held, told))
    file = TensorFile(path)
    found = {name: (info.dtype, info.shape) for name, (info, _) in file.entries.items()}
    assert found == {name: (values.dtype, tuple(values.shape)) for name, values in held.items()}
    assert file.header.metadata == (told or {})
    for name, (info, start) in file.entries.items():
        data = file.read(start, info.nbytes)
        assert data == bytes(octets(held[name]))
        assert bytes(octets(tensor_from(data, info.dtype, info.shape))) == data
    file.close()


@settings(deadline=None)
@given(held=files, told=notes)
def test_a_header_of_ours_is_read_by_the_library_as_it_was_meant(held: dict[str, Tensor], told: dict | None) -> None:
    header = parsed(save(held, told))
    infos = [info for info, _ in header.entries]
    data = encode_header(infos, header.metadata) + b"".join(bytes(octets(held[info.name])) for info in infos)
    found = {name: (one["dtype"], one["shape"], one["data"]) for name, one in safetensors.deserialize(data)}
    assert found == {
        name: (SPELLINGS[values.dtype], list(values.shape), bytearray(octets(values))) for name, values in held.items()
    }
    assert parsed(data).metadata == (told or {})


@settings(deadline=None, max_examples=500)
@given(st.data())
def test_a_header_with_flipped_bytes_is_refused_or_read_as_the_library_reads_it(source: st.DataObject) -> None:
    header = bytearray(SOUND[:-32])
    values = st.integers(0, 255) | st.sampled_from(b' \n{}[]",:-.0123456789eu\\')
    places = st.tuples(st.integers(0, len(header) - 1), values)
    for place, byte in source.draw(st.lists(places, min_size=1, max_size=3)):
        header[place] = byte
    try:
        found = {name: (SPELLINGS[dtype], list(shape)) for (name, dtype, shape), _ in parsed(header + DATA).entries}
    except FormatError:
        return
    assert found == {name: (one["dtype"], one["shape"]) for name, one in safetensors.deserialize(bytes(header + DATA))}


def test_every_dtype_of_the_library_is_known() -> None:
    """The library lists its own in what it says of one that is none."""
    with pytest.raises(safetensors.SafetensorError) as raised:
        safetensors.deserialize(entry(dtype='"F33"'))
    assert set(re.findall("`([A-Z0-9_]+)`", str(raised.value))) - {"F33"} == set(DTYPES)


@pytest.mark.parametrize("spelling", DTYPES)
@pytest.mark.parametrize("shape", [[8], [4, 2], [2, 3], [3], [1], [0], []])
def test_every_dtype_takes_as_many_bytes_as_the_library_says(spelling: str, shape: list[int]) -> None:
    sound = []
    for size in range(70):
        field = {"dtype": spelling, "shape": shape, "data_offsets": [0, size]}
        data = spelled(json.dumps({"a": field}), bytes(size))
        try:
            found = [(name, SPELLINGS[dtype], list(given)) for (name, dtype, given), _ in parsed(data).entries]
        except FormatError:
            with pytest.raises(safetensors.SafetensorError):
                safetensors.deserialize(data)
            continue
        assert found == [(name, one["dtype"], one["shape"]) for name, one in safetensors.deserialize(data)]
        sound.append(size)
    assert len(sound) <= 1
