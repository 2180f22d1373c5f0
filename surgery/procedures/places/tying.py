"""Tying: output heads that share the embedding's memory, and the tensors that have a row for each token.

A checkpoint does not say so: a head that its files lack is the embedding.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from surgery.core.site import Site, TensorInfo
from surgery.errors import printable
from surgery.hosts.checkpoint import Checkpoint

HEAD = "lm_head.weight"
# Kinds of models that have a head over the vocabulary.
_TYING = ("ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForConditionalGeneration", "ForPreTraining", "MTModel")
# The families of transformers whose head is called HEAD, and computes the same whether it is tied or not.
_SEPARABLE = frozenset(
    (
        *("bart", "bloom", "codegen", "cohere", "ctrl", "deepseek_v3", "falcon", "gemma", "gemma2", "gemma3_text"),
        *("glm", "glm4", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox", "gpt_oss", "gptj", "granite", "llama"),
        *("mistral", "mixtral", "mpt", "olmo", "olmo2", "olmoe", "openai-gpt", "opt", "persimmon", "phi", "phi3"),
        *("qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "smollm3", "stablelm", "starcoder2", "xglm"),
    )
)
_FREE = ("ForCausalLM", "LMHeadModel")
# What transformers' models call the embedding of their tokens; XLM, Flaubert and RWKV the last.
EMBEDDINGS = (
    *("embed_tokens", "wte", "word_embeddings", "word_embedding", "tok_embeddings", "embed_in", "shared"),
    *("tokens_embed", "embeddings"),
)


@dataclass(frozen=True)
class Tying:
    """The embedding that an absent head is tied to, and whether the two can be written apart."""

    embedding: TensorInfo
    separable: bool
    asked: Callable[[], str | None] = lambda: HEAD  # what the head's weight is called; None where nothing tells

    @property
    def head(self) -> Site:
        """As it would be written."""
        return self._site(self._called or HEAD)

    @property
    def known_head(self) -> Site | None:
        """The same, where the model in memory is known to have it, or to be able to."""
        return None if self._called is None else self._site(self._called)

    @cached_property
    def _called(self) -> str | None:
        return self.asked()

    def _site(self, name: str) -> Site:
        return Site(name.rpartition(".")[0], {"weight": self.embedding._replace(name=name)})


def tying_of(base: Checkpoint) -> Tying | None:
    """None where the model has no head, or one of its own."""
    found = [info for info in base.weights() if is_embedding(info.name) and len(info.shape) == 2]
    if len(found) != 1 or not ties_head(base, found[0]):
        return None
    kind = architecture(base.config)
    if base.config.get("model_type") in _SEPARABLE:
        return Tying(found[0], kind.endswith(_FREE) and base.info(HEAD) is None)
    if found[0].name.split(".")[-2] == "shared":  # of T5, BART and their like
        return Tying(found[0], False)
    return Tying(found[0], False, partial(_head_in_memory, base, found[0].name))


def _head_in_memory(base: Checkpoint, embedding: str) -> str | None:
    """What is tied to it there, if that is one: to ask takes a second, and transformers."""
    ties, there = base.ties(), base.called()(embedding)
    found = [name for name, one in ties.items() if one == there and not is_embedding(name) and base.info(name) is None]
    return found[0] if len(found) == 1 else None


def tied_though_held(base: Checkpoint) -> Tying | None:
    """The embedding and a head that the files hold, though config.json ties it to that; None where it does not.

    Loaders then leave the head out, or take it where the two differ.
    """
    found = [info for info in base.weights() if is_embedding(info.name) and len(info.shape) == 2]
    head, parts = base.info(HEAD), (text_config(base.config), base.config)
    told = next((part["tie_word_embeddings"] for part in parts if "tie_word_embeddings" in part), False)
    if told is not True or len(found) != 1 or head is None or head.shape != found[0].shape:
        return None
    return Tying(found[0], base.config.get("model_type") in _SEPARABLE)


def is_embedding(name: str) -> bool:
    """Is it the weight of a token embedding?"""
    parts = name.split(".")
    return len(parts) > 1 and parts[-1] == "weight" and parts[-2] in EMBEDDINGS


def ties_head(base: Checkpoint, embedding: TensorInfo) -> bool:
    """Whether the model has an output head, and no tensor for it is here: it is the embedding's."""
    alike = [info for info in base.weights() if info.shape == embedding.shape and not _in_layer(info.name)]
    if is_embedding(embedding.name):  # a second embedding is no head
        alike = [info for info in alike if not is_embedding(info.name)]
    heads = [info for info in alike if info.name != embedding.name]
    return architecture(base.config, "ForCausalLM").endswith(_TYING) and not heads


def why_absent(base: Checkpoint, name: str) -> str:
    """That a tensor is not in the files because it is another's; nothing where that is not so."""
    other = base.ties().get(name)
    told = "" if other is None else f"it is tied to {printable(other)}, which alone is in the files"
    return told and f"{told}; save the base with the two apart first"


def vocabulary(base: Checkpoint) -> dict[str, TensorInfo]:
    """The tensors with a row for each token: embedding, head, the head's bias."""
    size = text_config(base.config).get("vocab_size")
    rows = {info.shape[0] for info in base.weights() if is_embedding(info.name) and info.shape}
    rows = {size} if isinstance(size, int) else rows
    return {
        info.name: info
        for info in base.weights()
        if info.shape and info.shape[0] in rows and not _in_layer(info.name) and "position" not in info.name
    }


def architecture(config: Mapping[str, Any], default: str = "") -> str:
    """The class that a config.json names first."""
    told = config.get("architectures")
    return str(told[0]) if isinstance(told, list) and told else default


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config.json that speaks of the text model: the one that tells the size of the vocabulary."""
    inner = (value for value in config.values() if isinstance(value, dict) and "vocab_size" in value)
    return config if "vocab_size" in config else next(inner, config)


def _in_layer(name: str) -> bool:
    """Is it inside a numbered layer? No output head is, whatever its shape."""
    return any(part.isdigit() for part in name.split("."))
