"""The process that runs a graph: `python child.py GRAPH IN.npz OUT.npz`. It imports nothing of surgery.

Inputs are named `TRIAL/NAME`, and so are the outputs. Weights are mapped, not copied.
"""

import sys

import numpy
import onnxruntime


def main(graph: str, given: str, out: str) -> None:
    """Run every trial."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.disable_prepacking", "1")
    session = onnxruntime.InferenceSession(
        graph, options, providers=["CPUExecutionProvider"], disabled_optimizers=["ConstantFolding"]
    )
    names = [one.name for one in session.get_outputs()]
    trials: dict[str, dict[str, numpy.ndarray]] = {}
    with numpy.load(given) as held:
        for key in held.files:
            trial, _, name = key.partition("/")
            trials.setdefault(trial, {})[name] = held[key]
    found = {}
    for trial, feeds in trials.items():
        for name, values in zip(names, session.run(names, feeds), strict=True):
            found[f"{trial}/{name}"] = values
    numpy.savez(out, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
