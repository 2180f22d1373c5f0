"""Tying: output heads that share the embedding's memory, and the tensors that have a row for each token.

A checkpoint does not say so: a head that its files lack is the embedding.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from surgery.core.site import Site, TensorInfo
from surgery.hosts.checkpoint import Checkpoint

HEAD = "lm_head.weight"
# Kinds of models that have a head over the vocabulary.
_TYING = ("ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForConditionalGeneration", "ForPreTraining")
# Of those, the ones whose head is called HEAD and computes the same whether it is tied or not.
_FREE = ("ForCausalLM", "LMHeadModel")
# What transformers' models call the embedding of their tokens.
EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "tok_embeddings", "embed_in", "shared", "tokens_embed")


class Tying(NamedTuple):
    """The embedding that an absent head is tied to, and whether the two can be written apart."""

    embedding: TensorInfo
    separable: bool

    @property
    def head(self) -> Site:
        """As it would be written."""
        return Site(HEAD.rpartition(".")[0], {"weight": self.embedding._replace(name=HEAD)})


def tying_of(base: Checkpoint) -> Tying | None:
    """None where the model has no head, or one of its own."""
    found = [info for info in base.tensors() if is_embedding(info.name) and len(info.shape) == 2]
    if len(found) != 1 or not ties_head(base, found[0]):
        return None
    return Tying(found[0], architecture(base.config, "ForCausalLM").endswith(_FREE) and HEAD not in base.at)


def is_embedding(name: str) -> bool:
    """Is it the weight of a token embedding?"""
    parts = name.split(".")
    return len(parts) > 1 and parts[-1] == "weight" and parts[-2] in EMBEDDINGS


def ties_head(base: Checkpoint, embedding: TensorInfo) -> bool:
    """Whether the model has an output head, and no tensor for it is here: it is the embedding's."""
    others = (info for info in base.tensors() if info.name != embedding.name and not _in_layer(info.name))
    kind = architecture(base.config, "ForCausalLM")
    return kind.endswith(_TYING) and all(info.shape != embedding.shape for info in others)


def vocabulary(base: Checkpoint) -> dict[str, TensorInfo]:
    """The tensors with a row for each token: embedding, head, the head's bias."""
    size = text_config(base.config).get("vocab_size")
    rows = {info.shape[0] for info in base.tensors() if is_embedding(info.name) and info.shape}
    rows = {size} if isinstance(size, int) else rows
    return {
        info.name: info
        for info in base.tensors()
        if info.shape and info.shape[0] in rows and not _in_layer(info.name) and "position" not in info.name
    }


def architecture(config: Mapping[str, Any], default: str = "") -> str:
    """The class that a config.json names first."""
    told = config.get("architectures")
    return str(told[0]) if isinstance(told, list) and told else default


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config.json that speaks of the text model."""
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) and "vocab_size" in inner else config


def _in_layer(name: str) -> bool:
    """Is it inside a numbered layer? No output head is, whatever its shape."""
    return any(part.isdigit() for part in name.split("."))
