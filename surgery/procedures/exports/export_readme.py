"""The README of an exported folder: how onnxruntime opens it without a copy of its weights."""

import os
from collections.abc import Mapping, Sequence

from surgery.formats.onnx.links import DATA, GRAPH
from surgery.io.staging import Staging
from surgery.procedures.writing.small_files import CARD

_BESIDE = "README.onnx.md"  # where the base has a card of its own
_OPENING = f"""\
# {GRAPH}

The graph has no weights of its own: it points into {{files}}. Keep them together, as real files, and do not rewrite \
them; `surgery verify` on this folder tells whether it still finds them.

Two session options let onnxruntime map the weights, instead of copying and repacking them:

```python
import onnxruntime

options = onnxruntime.SessionOptions()
options.add_session_config_entry("session.disable_prepacking", "1")
session = onnxruntime.InferenceSession("{GRAPH}", options, disabled_optimizers=["ConstantFolding"])
```

Opened so, a float32 model takes milliseconds and no memory until it runs. Halves, and codes that operators of ONNX \
decode, become float32 at each run; where speed matters more than memory, leave the options away.
"""
_ADAPTER = """
An adapter is put into the slots of the graph for a run; without one it is the base. At most one at a time: of two \
that are active, onnxruntime takes the first.

```python
adapter = onnxruntime.LoraAdapter()
adapter.Load("{first}.onnx_adapter")
run = onnxruntime.RunOptions()
run.add_active_adapter(adapter)
# session.run(None, inputs, run)
```

Here are: {all}.
"""


def write_readme(staging: Staging, sizes: Mapping[str, int], adapters: Sequence[str] = ()) -> dict[str, str]:
    """Beside the graph, under another name where there is a README already; returns its sha256 by name."""
    named = [f"`{name}`" for name in sizes if name.endswith((".safetensors", DATA))]
    files = ", ".join(named) if len(named) < 4 else f"{named[0]} to {named[-1]}"
    text = _OPENING.format(files=files)
    if adapters:
        text += _ADAPTER.format(first=adapters[0], all=", ".join(f"`{name}.onnx_adapter`" for name in adapters))
    name = _BESIDE if os.path.lexists(staging.folder / CARD) else CARD
    return {name: staging.write(name, text.encode())}
