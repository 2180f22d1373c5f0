"""The process that runs a graph: `python child.py GRAPH IN.npz OUT.npz`. It imports nothing of surgery.

Inputs are named `TRIAL/NAME`, and so are the outputs. The trial `decode` has a `prompt` and a number of `steps`; its
output is `tokens`. Weights are mapped, not copied.
"""

import sys
from typing import Any

import numpy
import onnxruntime

Arrays = dict[str, numpy.ndarray]


def main(graph: str, given: str, out: str) -> None:
    """Run every trial."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.disable_prepacking", "1")
    session = onnxruntime.InferenceSession(
        graph, options, providers=["CPUExecutionProvider"], disabled_optimizers=["ConstantFolding"]
    )
    trials: dict[str, Arrays] = {}
    with numpy.load(given) as held:
        for key in held.files:
            trial, _, name = key.partition("/")
            trials.setdefault(trial, {})[name] = held[key]
    found: Arrays = {}
    for trial, feeds in trials.items():
        outputs = decode(session, feeds) if trial == "decode" else run(session, feeds)
        found |= {f"{trial}/{name}": values for name, values in outputs.items()}
    write: Any = numpy.savez  # it takes any names
    write(out, **found)


def run(session: onnxruntime.InferenceSession, feeds: Arrays) -> Arrays:
    """The outputs by name."""
    names = [one.name for one in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def decode(session: onnxruntime.InferenceSession, feeds: Arrays) -> Arrays:
    """The most probable tokens, one after the other, each from the cache of those before."""
    ids, tokens = feeds["prompt"], []
    inputs = {one.name: one.shape for one in session.get_inputs()}
    past = {
        name: numpy.zeros([1, shape[1], 0, shape[3]], numpy.float32)
        for name, shape in inputs.items()
        if name.startswith("past_key_values.")
    }
    length = 0
    for _ in range(int(feeds["steps"])):
        end = length + ids.shape[1]
        step = {"input_ids": ids, "attention_mask": numpy.ones((1, end), numpy.int64)}
        step["position_ids"] = numpy.arange(length, end)[None]
        found = run(session, {name: one for name, one in {**step, **past}.items() if name in inputs})
        past = {name: found[name.replace("past_key_values", "present")] for name in past}
        ids, length = found["logits"][:, -1:].argmax(-1), end
        tokens.append(ids[0, 0])
    return {"tokens": numpy.array(tokens)}


if __name__ == "__main__":
    main(*sys.argv[1:])
