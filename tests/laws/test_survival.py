"""What is left of a change in all: the same bits, whichever weight was measured first."""

from itertools import permutations

from surgery.core.survival import Survival, total


def test_the_sum_over_weights_does_not_depend_on_which_was_ready_first() -> None:
    told = {
        name: Survival(wanted=1.0 / n, along=1.0 / n, moved=1.0 / n)
        for name, n in zip("abcd", (3, 7, 11, 13), strict=True)
    }
    in_turn = {total(dict(order)) for order in permutations(told.items())}
    assert len(in_turn) == 1
    plain = {sum(one.wanted for _, one in order) for order in permutations(told.items())}
    assert len(plain) > 1  # as float64 adds them


def test_of_no_weight_all_is_left() -> None:
    assert (total({}).retained, total({}).noise) == (1.0, 0.0)
