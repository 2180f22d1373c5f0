"""misplaced: what lies at a path where a model or an adapter is wanted, and what to name instead."""

from collections.abc import Mapping
from pathlib import Path

from surgery.errors import FormatError, printable
from surgery.io.header import HEADER_BYTES
from surgery.io.regular import open_regular

WANTED = "a model's folder or .safetensors file, an adapter's folder, or owner/name on the Hub is wanted"
_PICKLED = "which can run code when it is read; load it with what wrote it, and save it as safetensors"
_FOLDER = "name the folder that it lies in"

# By the whole name of a file.
_NAMED: Mapping[str, str] = {
    "adapter_config.json": f"the config of an adapter; {_FOLDER}",
    "config.json": f"the config of a model; {_FOLDER}",
    "record.json": "a record for undoing a merge; name the merged folder that it is of",
    "surgery.base.json": f"what an adapter tells of its base; {_FOLDER}",
    "surgery.receipt.json": f"the receipt of a merge; {_FOLDER}",
}
# By what its name ends in.
_ENDINGS: Mapping[str, str] = {
    ".safetensors.index.json": f"the index of a model's files; {_FOLDER}",
    ".onnx_adapter": "an adapter for onnxruntime; name the PEFT folder that it was made from",
    ".onnx": "an ONNX graph; `surgery verify` takes the folder of one, and all else the safetensors that it is of",
    ".gguf": "GGUF, which is not read; name the safetensors that it was made from",
    **dict.fromkeys((".bin", ".pt", ".pth", ".ckpt"), f"a pickle, {_PICKLED}"),
}


def refuse_other(path: Path) -> None:
    """FormatError for a file that neither is called so nor begins so as safetensors do. Those of the Hub's cache only
    begin so."""
    if path.suffix == ".safetensors" or _begins_so(path):
        return
    told = _NAMED.get(path.name) or next((what for end, what in _ENDINGS.items() if path.name.endswith(end)), "")
    raise FormatError(f"{printable(path)}: {f'it is {told}' if told else f'no safetensors file; {WANTED}'}")


def folder_in_words(folder: Path) -> str:
    """What lies in a folder without safetensors, and the next step."""
    names = sorted(path.name for path in folder.iterdir())
    if not names:
        return f"an empty folder; {WANTED}"
    if "record.json" in names:
        return f"it is {_NAMED['record.json']}"
    for end in (".bin", ".onnx", ".gguf"):
        if found := [name for name in names if name.endswith(end)]:
            return f"no safetensors, but {printable(found[0])}, {_ENDINGS[end]}"
    inner = sorted({path.parent.name for path in folder.glob("*/*.safetensors")})
    if inner:
        return f"no safetensors in it; name one of its sub-folders: {printable(', '.join(inner))}"
    if told := next((name for name in ("config.json", "adapter_config.json") if name in names), ""):
        return f"{told} and no safetensors; copy it again, whole"
    return f"no safetensors in it; {WANTED}"


def _begins_so(path: Path) -> bool:
    """With the length of a header, and one."""
    with open_regular(path, "a safetensors file") as file:
        first = file.read(9)
        size = path.stat().st_size
    return first[8:] == b"{" and int.from_bytes(first[:8], "little") <= min(HEADER_BYTES, size - 8)
