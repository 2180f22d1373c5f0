"""copy: every part is filled in order, by any number of workers; a failure stops the rest and is told."""

import threading
from collections.abc import Iterator, Sequence

import pytest
import torch

from surgery.core.codec import Packed
from surgery.core.site import Site, TensorInfo
from surgery.core.source import copy

TILES = 50


class Numbers:
    """A source whose weight at each row is the row itself; fails at one row of one site, if told."""

    def __init__(self, parts: int, failing: str = "", at: int = 0) -> None:
        self.found = [Site(f"s{n}", {"weight": TensorInfo(f"s{n}", torch.float32, (TILES,))}) for n in range(parts)]
        self.failing, self.at = failing, at
        self.threads: set[int] = set()
        self.torch_threads: set[int] = set()

    def sites(self) -> Sequence[Site]:
        return self.found

    def load(self, site: Site, rows: slice | None = None) -> Packed:
        assert rows is not None
        self.threads.add(threading.get_ident())
        self.torch_threads.add(torch.get_num_threads())
        if site.name == self.failing and rows.start == self.at:
            raise ValueError(site.name)
        return Packed({"weight": torch.arange(rows.start, rows.stop)})


class OnePart:
    def __init__(self, site: Site) -> None:
        self.sites, self.rows, self.closed = [site], list[int](), False

    def tiles(self, site: Site) -> Iterator[slice]:
        del site
        return iter([slice(row, row + 1) for row in range(TILES)])

    def store(self, site: Site, packed: Packed, rows: slice) -> None:
        assert site is self.sites[0]
        assert packed.tensors["weight"].tolist() == [rows.start]
        self.rows.append(rows.start)

    def close(self) -> None:
        self.closed = True


class Parts:
    def __init__(self) -> None:
        self.made: list[OnePart] = []

    def parts(self, sites: Sequence[Site]) -> Sequence[OnePart]:
        self.made = [OnePart(site) for site in sites]
        return self.made


@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize("parts", [0, 1, 4])
def test_every_part_is_filled_in_order_and_closed(parts: int, workers: int) -> None:
    source, sink, before = Numbers(parts), Parts(), torch.get_num_threads()
    copy(source, sink, workers)
    assert [part.rows for part in sink.made] == [list(range(TILES))] * parts
    assert all(part.closed for part in sink.made)
    assert torch.get_num_threads() == before
    if min(workers, parts) > 1:
        assert threading.get_ident() not in source.threads
        assert source.torch_threads == {1}


@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize("at", [0, TILES - 1])
def test_a_failure_is_told_and_no_part_goes_on(workers: int, at: int) -> None:
    source, sink = Numbers(4, failing="s1", at=at), Parts()
    before, threads = torch.get_num_threads(), threading.enumerate()
    with pytest.raises(ValueError, match="s1"):
        copy(source, sink, workers)
    assert not sink.made[1].closed
    assert sink.made[1].rows == list(range(at))
    assert torch.get_num_threads() == before
    assert {*threading.enumerate()} <= {*threads}
