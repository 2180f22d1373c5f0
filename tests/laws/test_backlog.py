"""Backlog: calls made behind their caller, in its order, whatever fails."""

import threading

import pytest

from surgery.core.workers import Backlog

AHEAD = (0, 1, 8)


@pytest.mark.parametrize("ahead", AHEAD)
def test_calls_are_made_once_and_in_order(ahead: int) -> None:
    made: list[int] = []
    backlog = Backlog(ahead)
    for number in range(100):
        backlog(made.append, number)
    backlog.catch_up()
    assert made == list(range(100))


@pytest.mark.parametrize("ahead", [1, 8])
def test_no_more_than_so_many_calls_wait(ahead: int) -> None:
    begun, go_on = threading.Semaphore(0), threading.Event()
    backlog, told = Backlog(ahead), []

    def slow() -> None:
        begun.release()
        go_on.wait()

    def caller() -> None:
        for number in range(ahead + 5):
            backlog(slow)
            told.append(number)

    thread = threading.Thread(target=caller)
    thread.start()
    begun.acquire()
    thread.join(0.05)
    assert thread.is_alive()
    assert len(told) == ahead
    go_on.set()
    thread.join()
    assert len(told) == ahead + 5


@pytest.mark.parametrize("ahead", AHEAD)
def test_a_failure_is_raised_to_the_caller(ahead: int) -> None:
    backlog = Backlog(ahead)
    made: list[int] = []
    with pytest.raises(ZeroDivisionError):  # noqa: PT012  # by the call, or by one of those after it
        backlog(lambda: 1 // 0)
        for number in range(20):
            backlog(made.append, number)
    assert made == []  # a piece behind a hole is not written
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            backlog.catch_up()


def test_what_is_dropped_is_not_made_and_what_is_being_made_ends() -> None:
    begun, go_on, made = threading.Event(), threading.Event(), []

    def slow() -> None:
        begun.set()
        go_on.wait()
        made.append("first")

    backlog = Backlog(8)
    backlog(slow)
    backlog(made.append, "second")
    begun.wait()
    threading.Timer(0.05, go_on.set).start()
    backlog.drop()
    assert made == ["first"]
