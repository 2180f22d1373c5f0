"""TrainableTokensConfig: rows of embeddings and output heads, replaced by trained ones, and nothing besides."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

from surgery.core.config import AdapterConfig
from surgery.core.spec import Spelling
from surgery.errors import ConfigError, printable, quoted
from surgery.methods.lora_fields import check_token_list
from surgery.methods.token_rows import TokenRows

_SPELLING = "trainable_tokens_delta"


@dataclass(frozen=True, kw_only=True)
class TrainableTokensConfig(AdapterConfig):
    """Which rows are trained, named as in PEFT: of an Embedding, or of a Linear that has an output for each token.

    Without `target_modules` it is the embedding of tokens. What is tied to it has the same rows, which are held once.

    >>> TrainableTokensConfig(token_indices=[7, 3]).method("embed_tokens").tokens
    (7, 3)
    """

    peft_type: ClassVar[str] = "TRAINABLE_TOKENS"
    spellings: ClassVar[Mapping[str, Spelling]] = {_SPELLING: Spelling("t", "embedding", alone=True)}
    neutral: ClassVar[Mapping[str, Any]] = {}
    unwritten = frozenset({"exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern"})
    repeats_rows = True

    token_indices: Sequence[int] = field(default_factory=list)
    init_weights: bool = True  # do they begin as what stands there? Else as normal numbers

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.token_indices, list | tuple):
            raise ConfigError(f"token_indices is {quoted(self.token_indices)}; a list of tokens is wanted")
        check_token_list("token_indices", self.token_indices)

    def rows(self) -> Collection[str] | None:
        return None if self.target_modules is None else ()

    def with_rows(self, names: Collection[str]) -> Self:
        return self if self.target_modules is not None else replace(self, target_modules=list(names))

    def method(self, name: str) -> TokenRows:
        if not self.token_indices:
            raise ConfigError(f"token_indices is empty, and {printable(name)} is adapted; a list of tokens is wanted")
        return TokenRows(tuple(self.token_indices), "token_indices", _SPELLING, drawn=not self.init_weights)
