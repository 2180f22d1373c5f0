"""true_config: what config.json has to say of a merged model: dtype, vocabulary, ties, architecture, labels."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from surgery.procedures.places.tying import architecture, text_config

# What transformers calls the model of a task, and what other models' names end in.
_TASKS = {
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
}
_ENDINGS = (
    *("ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForConditionalGeneration", "ForPreTraining", "Model"),
    *_TASKS.values(),
)


class Outcome(NamedTuple):
    """What a merge makes different, beside the values of weights."""

    vocab_size: int | None = None  # None: the base's
    untied: bool = False
    heads: Mapping[str, tuple[int, ...]] = {}  # tensors that the base lacks
    task_type: str | None = None  # of the adapter that brings them
    plain: bool = False  # no weight is held any more as the base says
    quantization: Mapping[str, Any] | None = None  # how weights are held now


def true_config(config: Mapping[str, Any], dtype: torch.dtype | None, outcome: Outcome) -> Mapping[str, Any] | None:
    """`config` as it has to be; None where nothing changes, or where there is none."""
    if not config:
        return None
    told: dict[str, Any] = {key: dict(one) if isinstance(one, dict) else one for key, one in config.items()}
    text = text_config(told)
    for part in (told, text, told.get("text_config")):
        if not isinstance(part, dict):
            continue
        if dtype is not None:
            _set_dtype(part, dtype)
        if outcome.plain:
            part.pop("quantization_config", None)
        if outcome.untied and (part is told or "tie_word_embeddings" in part):
            part["tie_word_embeddings"] = False
    if outcome.vocab_size is not None and isinstance(text, dict):
        text["vocab_size"] = outcome.vocab_size
    if outcome.quantization is not None:
        inner = (part for part in (text, told.get("text_config")) if isinstance(part, dict))
        next((part for part in inner if "quantization_config" in part), told)["quantization_config"] = (
            outcome.quantization
        )
    if outcome.task_type in _TASKS:
        told |= _of_task(config, outcome.heads, outcome.task_type)
    return None if told == config else told


def _set_dtype(config: dict[str, Any], dtype: torch.dtype) -> None:
    told = [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]
    config |= dict.fromkeys(told, str(dtype).removeprefix("torch."))


def _of_task(config: Mapping[str, Any], heads: Mapping[str, tuple[int, ...]], task_type: str) -> dict[str, Any]:
    """The architecture and the labels that a head stands for."""
    found: dict[str, Any] = {}
    kind = architecture(config)
    stem = next((kind.removesuffix(end) for end in _ENDINGS if kind.endswith(end)), "")
    if stem:
        found["architectures"] = [stem + _TASKS[task_type]]
    matrices = [shape for name, shape in sorted(heads.items()) if name.endswith(".weight") and len(shape) == 2]
    count = min((shape[0] for shape in matrices), default=0)  # of a head of two layers, the last has the labels
    if count and len(config.get("id2label") or {}) != count:
        found["id2label"] = {str(i): f"LABEL_{i}" for i in range(count)}
        found["label2id"] = {f"LABEL_{i}": i for i in range(count)}
    return found
