"""Calibration: inputs of linear maps by module, which tell whose errors matter where weights are rounded.

In safetensors files, as `record_inputs` writes them, or made by hand: NAME.inputs [n, in], rows that are inputs of the
module or have the same second moment; and, if there is more, NAME.rest [in], the mean square of what is not in these.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from torch import Tensor

from surgery.codecs.plain import PLAIN_DTYPES
from surgery.core.arithmetic import all_finite
from surgery.core.feedback import Feedback
from surgery.core.names import nearest
from surgery.core.site import TensorInfo
from surgery.errors import FormatError, MatchError, ShapeError, ValueRangeError, printable
from surgery.io.octets import tensor_from
from surgery.io.open_files import OpenFiles
from surgery.io.regular import contained, file_sha256
from surgery.io.tensor_file import TensorFile

INPUTS, REST = ".inputs", ".rest"
MOST = 512  # inputs of a module: the time of rounding grows with their number


class Calibration(OpenFiles):
    """A file, or all of a folder; a context. FormatError for tensors of other names or shapes."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        names = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
        if not names:
            raise FormatError(f"{printable(path)}: no .safetensors in it; what record_inputs writes is wanted")
        self.at: dict[str, tuple[TensorFile, TensorInfo]] = {}
        try:
            for name in names:
                self._add(contained(path, name.name) if path.is_dir() else name)
            self._check_rests()
        except BaseException:
            self.close()
            raise
        self.sha256: Mapping[str, str] = {file.path.name: file_sha256(file.path) for file in self.files}

    def of(self, module: str, columns: int) -> Callable[[], Feedback] | None:
        """What reads that of a module of so many inputs; None where it has none. ShapeError."""
        if module + INPUTS not in self.at:
            return None
        _, info = self.at[module + INPUTS]
        if info.shape[1] != columns:
            raise ShapeError(
                f"{printable(self.path)}: {printable(info.name)} is {list(info.shape)}, and the module has {columns} "
                "inputs; was it recorded of another model?"
            )
        return partial(self._feedback, module)

    def refuse_other(self, modules: list[str]) -> None:
        """MatchError where it speaks of none of these modules."""
        here = [name.removesuffix(INPUTS) for name in self.at if name.endswith(INPUTS)]
        if modules and not {*here} & {*modules}:
            close = ", ".join(map(printable, nearest(modules[0], here)))
            raise MatchError(
                f"{printable(self.path)}: no inputs of an adapted module, such as {printable(modules[0])}; nearest: "
                f"{close}; record them of this model"
            )

    def _feedback(self, module: str) -> Feedback:
        """InputError if a file is no longer what was opened."""
        rest = self._read(module + REST) if module + REST in self.at else None
        found = Feedback.of_inputs(self._read(module + INPUTS), rest)
        self.check_unchanged()
        return found

    def _add(self, path: Path) -> None:
        file = TensorFile(path)
        self.files.append(file)
        for entry in file.header.entries:
            self._check(entry.info, file)
            self.at[entry.info.name] = file, entry.info

    def _check_rests(self) -> None:
        for name, (file, info) in self.at.items():
            if not name.endswith(REST):
                continue
            inputs = name.removesuffix(REST) + INPUTS
            if inputs not in self.at or self.at[inputs][1].shape[1:] != info.shape:
                found = list(self.at[inputs][1].shape) if inputs in self.at else "not there"
                raise FormatError(
                    f"{file.where}: {printable(name)} is {list(info.shape)}, and {printable(inputs)} is {found}; "
                    "as many columns are wanted in both; record anew"
                )

    def _check(self, info: TensorInfo, file: TensorFile) -> None:
        axes = 2 if info.name.endswith(INPUTS) else 1
        known = info.name.endswith((INPUTS, REST)) and len(info.shape) == axes and info.dtype in PLAIN_DTYPES
        if not known or not all(info.shape) or (axes == 2 and info.shape[0] > MOST) or info.name in self.at:
            raise FormatError(
                f"{file.where}: {printable(info.name)} is {str(info.dtype).removeprefix('torch.')} "
                f"{list(info.shape)}; floats, once each, are wanted: NAME{INPUTS} [n, in] of up to {MOST} inputs, and "
                f"NAME{REST} [in]; record_inputs writes such a file"
            )

    def _read(self, name: str) -> Tensor:
        file, info = self.at[name]
        values = tensor_from(file.read(file.entries[name].start, info.nbytes), info.torch_dtype, info.shape)
        if not all_finite(values) or (name.endswith(REST) and bool((values < 0).any())):
            raise ValueRangeError(
                f"{file.where}: {printable(name)} holds NaN, infinity or a square below 0; record anew"
            )
        return values
