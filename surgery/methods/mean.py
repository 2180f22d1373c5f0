"""Mean: of matrices that come one by one, of which the sum alone is kept."""

from torch import Tensor


class Mean:
    """In the dtype of the first."""

    def __init__(self) -> None:
        self.sum: Tensor | None = None
        self.count = 0

    def add(self, values: Tensor) -> None:
        self.sum = values.clone() if self.sum is None else self.sum.add_(values)
        self.count += 1

    @property
    def value(self) -> Tensor:
        """Of those that have come, one at least."""
        assert self.sum is not None
        return self.sum / self.count
