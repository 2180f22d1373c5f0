"""Run the benchmarks that fit on a GPU, print their table, and write it to RESULTS.md, where `make bench` leaves it."""

from importlib.metadata import version

import torch

from bench.__main__ import RESULTS, machine, measured
from bench.words import put_between

BENCHMARKS = (
    "inject",
    "load",
    "forward",
    "train",
    "step",
    "step 1.1B",
    "quantized_step",
    "live_merge",
)
MARKS = "<!-- on a GPU: written by `python -m bench.gpu` -->", "<!-- end of a GPU -->"


def main() -> None:
    if not torch.cuda.is_available():
        raise SystemExit("bench.gpu: there is no GPU")
    card = f"One {torch.cuda.get_device_name()}, {machine().removesuffix('.')}, bitsandbytes {version('bitsandbytes')}"
    text = f"{measured(BENCHMARKS, 'cuda')}\n\n{card}."
    put_between(RESULTS, MARKS, f"{text} Both sides ran in turn, in one process.")
    print(text)


if __name__ == "__main__":
    main()
