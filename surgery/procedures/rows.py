"""Rows: which modules of a model have single rows that an adapter replaces, PEFT's `trainable_token_indices`."""

from collections.abc import Collection, Mapping

from surgery.core.config import AdapterConfig
from surgery.core.method import Method
from surgery.core.names import nearest, suffix_hits
from surgery.errors import MatchError, printable
from surgery.hosts.recognition import op_of
from surgery.methods.token_rows import TokenRows
from surgery.procedures.model_tree import Tree
from surgery.procedures.tying import EMBEDDINGS


def with_rows(tree: Tree, config: AdapterConfig, adapted: Collection[str]) -> tuple[AdapterConfig, list[str]]:
    """The config with these modules in full, and their paths. MatchError for one that is not there, or adapted too."""
    entries = config.rows()
    if entries is None:
        found = {tree.first_name(name) for name in tree.modules if _embeds(tree, name)}
        if len(found) != 1:
            told = ", ".join(map(printable, sorted(found))) or "none is called as usual"
            raise MatchError(
                f"trainable_token_indices: one embedding of tokens is wanted, and here {told}; name its module"
            )
    else:
        found = {tree.first_name(name) for name in tree.modules if suffix_hits(entries, name)}
        for entry in entries:
            if not any(suffix_hits((entry,), name) for name in tree.modules):
                close = ", ".join(map(printable, nearest(entry, tree.modules)))
                raise MatchError(f"trainable_token_indices: nothing matches {printable(entry)!r}; nearest: {close}")
    for name in sorted(found & {*adapted}):
        raise MatchError(
            f"{printable(name)}: trainable_token_indices and target_modules both name it, which PEFT refuses too; "
            "leave one out"
        )
    return config.with_rows(sorted(found)), sorted(found)


def refuse_tied_rows(tree: Tree, methods: Mapping[str, Method], saved: Collection[str]) -> None:
    """MatchError where rows are replaced of a weight that another module has too, or that is replaced whole."""
    for name in (name for name, method in methods.items() if isinstance(method, TokenRows)):
        if any(name == other or name.startswith(f"{other}.") for other in saved):
            raise MatchError(
                f"{printable(name)}: trainable_token_indices and modules_to_save both name it; leave one out"
            )
        module = tree.plain(name)
        weight = module._parameters.get("weight")
        others = [
            other
            for other in tree.modules
            if weight is not None and tree.plain(other) is not module and tree.held(other).get("weight") is weight
        ]
        if others:
            raise MatchError(
                f"{printable(name)}: its weight is tied to {printable(others[0])}, which would keep the old rows here; "
                "merge the files, where both change, or untie them first"
            )


def _embeds(tree: Tree, name: str) -> bool:
    op = op_of(tree.plain(name))
    return name.rpartition(".")[2] in EMBEDDINGS and op is not None and op.name == "embedding"
