"""combine: several LoRA adapters as one adapter folder in PEFT's format, and how far it is from their exact sum."""

import math
from collections.abc import Callable, Collection, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from surgery.adapters import out_proj
from surgery.adapters.peft import CONFIG, config_bytes
from surgery.adapters.spill import Spill
from surgery.core.adapter import Weighted
from surgery.core.names import prefix_between
from surgery.core.turned import EMBEDDING
from surgery.errors import InputError, UsageError, printable
from surgery.io.fingerprint import BASE_PRINT, base_print_bytes
from surgery.io.octets import octets
from surgery.io.place import refuse_overlap
from surgery.io.staging import Staging
from surgery.methods.lora_config import LoraConfig
from surgery.procedures.making.by_parameter import by_parameter
from surgery.procedures.making.combinations import Factors, Recipe
from surgery.procedures.making.combined import combined
from surgery.procedures.making.fidelity import Fidelity, FidelityReport
from surgery.procedures.making.ranked_config import ranked_config
from surgery.procedures.making.tied_sites import tied_sites
from surgery.procedures.places.parameters import spelled_without_model

Value = TypeVar("Value")

_LEFT_OUT = (
    "use_dora",
    "lora_bias",
    "bias",
    "use_bdlora",
    "use_qalora",
    "layer_replication",
    "trainable_token_indices",
)


@dataclass(frozen=True, repr=False)
class CombineReport(FidelityReport):
    """What was written, and how far it is from the exact sum: `relative_error` in all, `sites` one by one."""

    notes: tuple[str, ...] = ()  # on what no file tells

    title = "surgery combine"

    @property
    def reproducible(self) -> bool:
        return self.method != "svd"  # LAPACK's bits differ from machine to machine

    def summary(self) -> str:
        """One line."""
        return "; ".join([super().summary(), *self.notes])

    def to_json(self) -> dict[str, Any]:
        return {**super().to_json(), "notes": list(self.notes)}


def combine(given: Sequence[Weighted], out: Path, recipe: Recipe, *, overwrite: bool = False) -> CombineReport:
    """Write the combination of `given` to the new folder `out`; whole, or `out` stays as it is.

    InputError for an adapter that is no LoRA, for sites, saved modules or settings that contradict each other.
    """
    if not given:
        raise UsageError("combine: no adapter is given; one or more are wanted")
    refuse_overlap(out, [Path(one.adapter.where) for one in given])
    configs = [_lora(one) for one in given]
    given, parameters, notes = by_parameter(given)
    spelled = spelled_without_model(sorted(parameters))
    _check_names(given)
    ops = _united(given, "the op of", lambda one: one.adapter.ops, lambda op: op)
    saved = _united(given, "the saved", lambda one: one.adapter.saved, _content)
    _check_weights(given, saved)
    copies = _united(given, "the copy of", lambda one: one.adapter.copies, _content)
    trained_on = _united(given, "the base's", lambda one: one.adapter.trained_on, lambda told: told)
    sites: dict[str, Fidelity] = {}
    with Staging(out, overwrite=overwrite) as staging, Spill(staging) as spill:
        draws, tied = recipe.draws(), tied_sites(given)
        heads = tied or {}
        for name in sorted({name for one in given for name in one.adapter.sites} - heads.keys()):
            made, sites[name] = combined(name, given, recipe, draws, parameters)
            _spill(spill, spelled.get(name, name), ops.get(name), made)
            for head in [one for one, of in heads.items() if of == name]:
                sites[head], op = sites[name], ops.get(head)
                _spill(spill, head, op, made if op == EMBEDDING else Factors(made.B.mT, made.A.mT))
        for name, values in (saved | _placed(copies, sites)).items():
            spill.add(name, values)
        config = _config(configs, {name: one.r for name, one in sites.items()}, parameters, tied is not None)
        spill.write()
        if trained_on:
            staging.write(BASE_PRINT, base_print_bytes(trained_on))
        staging.write(CONFIG, config_bytes(config))
    return CombineReport(out, recipe.method, sites, notes)


def _spill(spill: Spill, name: str, op: str | None, made: Factors) -> None:
    prefix, suffix = ("lora_embedding_", "") if op == EMBEDDING else ("lora_", ".weight")
    spill.add(f"{name}.{prefix}A{suffix}", made.A)
    spill.add(f"{name}.{prefix}B{suffix}", out_proj.written(name, "B", made.B))


def _check_names(given: Sequence[Weighted]) -> None:
    """InputError where adapters name the same sites by another prefix, so that a sum would hold both side by side."""
    for at, one in enumerate(given):
        for other in given[:at]:
            names, known = one.adapter.sites.keys(), other.adapter.sites.keys()
            prefix = None if names & known else prefix_between(names, known) or prefix_between(known, names)
            if prefix is not None and not (prefix.removed and prefix.added):
                raise InputError(
                    f"{printable(one.adapter.where)}: {printable(min(names))} is {printable(min(known))} in "
                    f"{printable(other.adapter.where)}, by another prefix; one spelling is wanted; merge both over "
                    "their base, or load one into the other's model and save it"
                )


def _placed(copies: Mapping[str, Tensor], sites: Container[str]) -> dict[str, Tensor]:
    """Copies of the base's own weights, as they are named under a layer that is adapted, or beside."""
    sited = {name: name.removesuffix(".weight") for name in copies}
    return {f"{sited[name]}.base_layer.weight" if sited[name] in sites else name: copies[name] for name in copies}


def _lora(one: Weighted) -> LoraConfig:
    config = one.adapter.config
    if not isinstance(config, LoraConfig):
        raise InputError(
            f"{printable(one.adapter.where)}: peft_type is {config.peft_type}; combine takes LORA; "
            "merge adapters of other types one over the other"
        )
    for found in _LEFT_OUT:
        if getattr(config, found) not in (None, False, "none"):
            raise InputError(
                f"{printable(one.adapter.where)}: it has {found}, which a sum of A and B leaves out; "
                "merge such adapters one over the other"
            )
    return config


def _united(
    given: Sequence[Weighted],
    what: str,
    held: Callable[[Weighted], Mapping[str, Value]],
    content: Callable[[Value], object],
) -> dict[str, Value]:
    """What the adapters hold by name, of which each may be in several if it is the same there."""
    found: dict[str, Value] = {}
    for one in given:
        for name, value in held(one).items():
            if name in found and content(found[name]) != content(value):
                raise InputError(
                    f"{printable(one.adapter.where)}: {what} {printable(name)} is not as in an adapter before it; "
                    "one for all is wanted; combine adapters of the same base that agree in it"
                )
            found[name] = value
    return found


def _check_weights(given: Sequence[Weighted], saved: Iterable[str]) -> None:
    """A trained module is taken whole: it has no fraction, but equal ones may share the weight of 1."""
    for name in sorted(saved):
        total = math.fsum(one.weight for one in given if name in one.adapter.saved)
        if total != 1 and any(one.weight != 1 for one in given if name in one.adapter.saved):
            raise InputError(
                f"{printable(name)}: modules_to_save replaces it, by adapters whose weights are {total:g} in all; "
                "1 is wanted, or 1 for each; leave it out of the adapters, or weigh them so"
            )


def _content(values: Tensor) -> object:
    return values.dtype, tuple(values.shape), bytes(octets(values.contiguous()))


def _config(
    configs: Sequence[LoraConfig], ranks: Mapping[str, int], parameters: Collection[str], ties: bool
) -> LoraConfig:
    """Of one base, if all name the same; of the task that those tell which tell one.

    `ties`: may heads and embeddings that are tied stay so?
    """
    tasks = {one.task_type for one in configs if one.task_type is not None}
    for field, values in (("fan_in_fan_out", {one.fan_in_fan_out for one in configs}), ("task_type", tasks)):
        if len(values) > 1:
            told = ", ".join(sorted(map(printable, values)))
            raise InputError(
                f"combine: {field} is not the same in all configs: {told}; one for all is wanted; "
                "were they trained on one model?"
            )
    bases = {(one.base_model_name_or_path, one.revision) for one in configs}
    base, revision = bases.pop() if len(bases) == 1 else (None, None)
    return ranked_config(
        ranks,
        parameters,
        modules_to_save=sorted({name for one in configs for name in one.modules_to_save or ()}) or None,
        ensure_weight_tying=ties and any(one.ensure_weight_tying for one in configs),
        fan_in_fan_out=configs[0].fan_in_fan_out,
        task_type=min(tasks, default=None),
        base_model_name_or_path=base,
        revision=revision,
    )
