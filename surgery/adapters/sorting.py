"""Sorting out: each tensor of an adapter's file has its place, by its name, or the file is refused."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from surgery.adapters.found import Found, of_indices, shapes, stored
from surgery.adapters.parts import MODEL, joined, part_of
from surgery.core.adapter import Adapter
from surgery.core.config import AdapterConfig
from surgery.core.names import Endings, in_base, owners, suffixes
from surgery.errors import ConfigError, FormatError, printable
from surgery.io.header import SPELLINGS

PREFIX = f"{MODEL}model."
_EMBEDDINGS = frozenset({"embed_tokens", "lm_head", "wte", "word_embeddings", "embed_in", "embed_out", "shared"})
_HEADS = frozenset({"lm_head", "embed_out"})
_INDICES = frozenset({torch.uint8, torch.int16, torch.int32, torch.int64})


def sorted_out(config: AdapterConfig, tensors: list[Found], where: str, sha256: Mapping[str, str]) -> Adapter:
    """The adapter that `tensors` are. FormatError for one that has no place, and for a place without its tensor."""
    sorting = _Sorting(config, where)
    for found in tensors:
        sorting.take(found)
    sorting.shared |= {role: joined(role, parts, where) for role, parts in sorting.parts.items()}
    if config.ties():
        sorting.settle_ties()
    if config.rows() is None:
        sorting.settle_rows()
    config = _told_of_rows(config, sorting.sites, where)
    if not sorting.targets:
        _check_complete(config, sorting.sites, where)
    _check_shared(config, sorting.shared, where)
    config = config.as_shaped({name: shapes(held) for name, held in sorting.sites.items()})
    _resolve(config, sorting.sites, where)
    adapter = Adapter(
        config,
        {name: stored(held) for name, held in sorting.sites.items()},
        sorting.saved,
        sorting.copies,
        sorting.ops,
        where,
        sha256,
        targets=frozenset(sorting.targets),
        biases=frozenset(sorting.biases),
    )
    return adapter.sharing(sorting.shared) if sorting.shared else adapter


class _Sorting:
    """What has found its place so far."""

    def __init__(self, config: AdapterConfig, where: str) -> None:
        self.config, self.where = config, where
        self.whole, self.endings = Endings(config.modules_to_save or ()), config.endings()
        self.sites: dict[str, dict[str, Found]] = {}
        self.shared: dict[str, Tensor] = {}
        self.parts: dict[str, dict[int, Tensor]] = {}
        self.saved: dict[str, Tensor] = {}
        self.copies: dict[str, Tensor] = {}
        self.ops: dict[str, str] = {}
        self.targets: set[str] = set()
        self.biases: set[str] = set()

    def take(self, found: Found) -> None:
        """Put a tensor in its place."""
        dtype = found.info.torch_dtype
        name = found.info.name.removeprefix(PREFIX)
        spelled = next((end for end in suffixes(name) if end in self.endings), None)
        role, part = self._shared_role(found.info.name), part_of(self.config, found.info.name)
        if part is not None and dtype.is_floating_point:
            self.parts.setdefault(part[0], {})[part[1]] = found.values
        elif role is not None and dtype.is_floating_point:
            self._share(role, found)
        elif spelled is not None and self._fits(spelled, dtype):
            self._at_site(name, spelled, of_indices(found) if self.endings[spelled].integers else found)
        elif self.config.copied and f".{self.config.copied}." in name:
            self._of_target(name, found)
        elif name.endswith(".base_layer.weight"):
            self._put(self.copies, in_base(name).replace(".token_adapter.", "."), found)
        elif self._is_bias(name):
            self._bias(name, found)
        elif self._is_saved(name):
            self._of_whole(name, found)
        elif name.endswith(".weight") and name.split(".")[-2] in _EMBEDDINGS:
            self._put(self.copies, name, found)  # as PEFT saves them where the vocabulary was resized
        else:
            raise FormatError(
                f"{printable(self.where)}: no place for {printable(found.info.name)} ({SPELLINGS[dtype]}); "
                f"{self.config.peft_type} tensors {self._wanted}; was it renamed?"
            )

    @property
    def _wanted(self) -> str:
        return f"lie in {self.config.copied}" if self.config.copied else f"end in {', '.join(self.endings)}"

    def settle_ties(self) -> None:
        """What looks like the base's own, and is what a trained module has, is tied to that."""
        for name, values in list(self.copies.items()):
            if any(torch.equal(values, one) for one in self.saved.values()):
                self.saved[name] = self.copies.pop(name)

    def settle_rows(self) -> None:
        """Of a head that is tied, PEFT writes the rows of its embedding again where the vocabulary was resized."""
        alone = {one.role for one in self.endings.values() if one.alone}
        rows = {name: held for name, held in self.sites.items() if held.keys() <= alone}
        heads = [name for name in rows if name.rpartition(".")[2] in _HEADS]
        embedding = next((held for name, held in rows.items() if name not in heads), {})
        for name in heads:
            if all(
                role in embedding and torch.equal(embedding[role].values, rows[name][role].values) for role in alone
            ):
                del self.sites[name]

    def _shared_role(self, name: str) -> str | None:
        """That of a tensor that all sites share."""
        path, _, last = name.rpartition(".")
        there = self.config.repeats_shared or path in {"", MODEL.rstrip(".")}
        return self.config.shared.get(last) if there else None

    def _share(self, role: str, found: Found) -> None:
        """Once in memory, however often the file has it."""
        values = found.values
        held = self.shared.setdefault(role, values)
        if held is not values and not torch.equal(held, values):
            raise FormatError(
                f"{printable(self.where)}: {printable(found.info.name)} is another than at other sites, and all share "
                "one; save it again"
            )

    def _fits(self, spelled: str, dtype: torch.dtype) -> bool:
        return dtype.is_floating_point or (self.endings[spelled].integers and dtype in _INDICES)

    def _at_site(self, name: str, spelled: str, found: Found) -> None:
        site = name.removesuffix(spelled).rstrip(".")
        role, op, *_ = self.endings[spelled]
        if role in self.sites.setdefault(site, {}):
            raise FormatError(f"{printable(self.where)}: {printable(site)} has two tensors {role}; one is wanted")
        self.sites[site][role] = found
        if op is not None:
            self.ops[site] = op

    def _of_target(self, name: str, found: Found) -> None:
        """Of what lies deeper in the module than it does itself, PEFT leaves the adapter's name there."""
        module, _, own = name.partition(f".{self.config.copied}.")
        self.targets.add(module)
        self._put(self.saved, f"{module}.{own.partition('.')[2] or own}", found)

    def _is_bias(self, name: str) -> bool:
        """Is it one of the base's own biases, which this config trains?"""
        ours = any(end in self.config.spellings for end in suffixes(name))
        return self.config.biases() != "none" and name.endswith(".bias") and not ours

    def _bias(self, name: str, found: Found) -> None:
        """PEFT writes those within modules_to_save up to three times: the copy's under two names, and the base's."""
        if name.endswith(".original_module.bias"):
            self._put(self.copies, name.replace(".original_module.", "."), found)
            return
        name = in_base(name).replace(".modules_to_save.", ".")
        self._put(self.saved, name, found)
        if not self._is_saved(name):
            self.biases.add(name)

    def _of_whole(self, name: str, found: Found) -> None:
        """PEFT writes those of a resized vocabulary three times: the copy's under two names, and what it replaces."""
        if ".original_module." not in name:
            self._put(self.saved, name.replace(".modules_to_save.", "."), found)

    def _is_saved(self, name: str) -> bool:
        return any(self.whole.end(module) for module in owners(name))

    def _put(self, held: dict[str, Tensor], name: str, found: Found) -> None:
        """Each tensor once; a copy may be there twice, if it is the same."""
        if name in held and not torch.equal(held[name], found.values):
            where = printable(self.where)
            raise FormatError(f"{where}: two tensors are {printable(name)}; one is wanted; save it again")
        held[name] = found.values


def _check_complete(config: AdapterConfig, sites: Mapping[str, Mapping[str, Found]], where: str) -> None:
    """Each site has every role of a form; an adapter has at least one site."""
    alone = {spelling.role for spelling in config.endings().values() if spelling.alone}
    forms = config.forms()
    if not sites and not (config.shared and frozenset() in forms):  # what sites share may be all that a file has
        raise FormatError(f"{printable(where)}: no {config.peft_type} tensor in it; was it saved without its weights?")
    for site, held in sites.items():
        lacking = min((sorted(roles - held.keys()) for roles in forms), key=len)
        if lacking and not (held.keys() <= alone and len(held) == 1):
            raise FormatError(
                f"{printable(where)}: {printable(site)} has no tensor {lacking[0]}, only {', '.join(sorted(held))}; "
                "the file is incomplete; save or download it again"
            )


def _check_shared(config: AdapterConfig, shared: Mapping[str, Tensor], where: str) -> None:
    """FormatError unless those that sites share are there, or are not, as the config says."""
    for name, role in config.shared.items():
        if config.keeps_shared() and role not in shared:
            raise FormatError(
                f"{printable(where)}: no {MODEL}{name} in it, which all sites share; the file is incomplete; save it "
                "again"
            )
        if role in shared and not config.keeps_shared():
            raise FormatError(
                f"{printable(where)}: {MODEL}{name} is in it, and its config says that it is not; PEFT draws another "
                "in its place; correct the config, or save it again"
            )


def _told_of_rows(config: AdapterConfig, sites: Mapping[str, Mapping[str, Found]], where: str) -> AdapterConfig:
    """The config with the modules whose rows are in the file. FormatError for rows without tokens, and the reverse."""
    alone = {spelling.role for spelling in config.endings().values() if spelling.alone}
    names = [name for name, held in sites.items() if held.keys() & alone]
    if config.rows() is None and len(names) != 1:
        found = ", ".join(map(printable, names)) or "none"
        raise FormatError(
            f"{printable(where)}: trainable_token_indices is of one embedding, and rows are there of {found}; those of "
            "one are wanted; save it again"
        )
    try:
        return config.with_rows(names)
    except ConfigError as error:
        raise FormatError(f"{printable(where)}: {error}") from error


def _resolve(config: AdapterConfig, sites: Iterable[str], where: str) -> None:
    """FormatError where a site's settings cannot be told, as a pattern takes too long, or the tensors are not all."""
    try:
        config.check_whole()
        for site in sites:
            config.method(site)
    except ConfigError as error:
        raise FormatError(f"{printable(where)}: {error}") from error
