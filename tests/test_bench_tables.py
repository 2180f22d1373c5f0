"""The rows that benchmarks print say what is measured and what is wanted of it."""

from bench.merge import COMMANDS, table


def test_the_bound_over_a_copy_is_told_with_the_seconds_that_it_leaves() -> None:
    kinds = ("copy", *COMMANDS, "peft", "mergekit")
    rows = table(dict.fromkeys(kinds, 2.0) | {"merge": 8.0}, dict.fromkeys(kinds, 100.0), 1, 1000)
    (row,) = (row for row in rows if "(cp + sync)" in row[4])
    assert row == [
        "the same over cp and sync, but for 3 s: starting Python and torch, and the last fsync",
        "8.0 s",
        "",
        "2.50 x 2.0 s + 3 s",
        "<= 2.0 x (cp + sync) + 3 s",
    ]
