"""OpenFiles: safetensors files that are open together, as a context."""

from typing import Self

from surgery.io.tensor_file import TensorFile


class OpenFiles:
    """`files` are closed at its end, whatever happens, and by `close`."""

    def __init__(self) -> None:
        self.files: list[TensorFile] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for file in self.files:
            file.close()

    def check_unchanged(self) -> None:
        """InputError if one is no longer what was opened."""
        for file in self.files:
            file.check_unchanged()
