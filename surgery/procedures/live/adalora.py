"""AdaLoRA in training: the regularizer of the loss, and the ranks that are allotted after each step."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from surgery.core.method import Params
from surgery.core.option_checks import check_whole
from surgery.core.sharded import fill, rest, whole
from surgery.errors import StateError, UsageError, printable
from surgery.hosts.tree import State, adapted_layers, injected, refuse_merged, state_of
from surgery.methods.adalora_config import AdaLoraConfig
from surgery.methods.adalora_ranks import Importance, Smoothed, budget, masks


class Trained(NamedTuple):
    """An adapter with its parameters by site."""

    name: str
    config: AdaLoraConfig
    sites: Mapping[str, Params]


def in_training(root: nn.Module) -> dict[str, AdaLoraConfig]:
    """The AdaLoRA adapters that run and are trained."""
    state = state_of(root)
    return {} if state is None or not state.enabled else trained_of(state, state.active)


def trained_of(state: State, adapters: Iterable[str]) -> dict[str, AdaLoraConfig]:
    """Those of the adapters that are AdaLoRA's and are trained."""
    found = {name: state.configs[name] for name in adapters}
    return {name: one for name, one in found.items() if isinstance(one, AdaLoraConfig) and not one.inference_mode}


def adalora_of(state: State, adapter: str) -> AdaLoraConfig:
    """Of an adapter that is AdaLoRA's."""
    found = state.configs[adapter]
    assert isinstance(found, AdaLoraConfig)
    return found


def orthogonal_loss(root: nn.Module) -> Tensor:
    """What keeps the vectors of the triplets orthogonal: weight * mean |A A^T - I|, |B^T B - I|, summed over adapters.

    UsageError where the model or AdapterTrainer has put it into the last loss already; StateError if no AdaLoRA is
    trained.
    """
    state = injected(root)
    if state.regularized:
        raise UsageError(
            "orthogonal_loss: the last loss holds it, of a model that was given labels, or of AdapterTrainer; use that "
            "loss as it is, or call the model without labels"
        )
    state.owed = False  # who asks for it adds it
    return regularizer(root)


def regularizer(root: nn.Module) -> Tensor:
    """The same, wherever else it is."""
    rest(root)  # else a share could be taken for a whole, and its gradient be lost
    terms = [config.orth_reg_weight * _mean(sites_of(root, name)) for name, config in _required(root).items()]
    return torch.stack(terms).sum()


def adalora_step(root: nn.Module, step: int) -> None:
    """After the optimizer's step number `step`, counted from 0, and before its gradients are cleared: allot ranks.

    StateError if no AdaLoRA is trained, has gradients, or has all its ranks still; ConfigError for a schedule that
    cannot be followed; ValueRangeError for scores that are no numbers.
    """
    check_whole("adalora_step: step", step, 0)
    refuse_merged(root, "allot ranks")
    rest(root)
    for name, config in _required(root).items():
        config.check_schedule()
        sites = sites_of(root, name)
        _refuse_reduced(sites, config)
        advance = _allot if step < config.end else _settle
        advance(injected(root), Trained(name, config, sites), step)


def sites_of(root: nn.Module, adapter: str) -> dict[str, Params]:
    """An adapter's parameters, by site."""
    layers = adapted_layers(root).items()
    return {name: layer.fitted[adapter].params for name, layer in layers if adapter in layer.fitted}


def _required(root: nn.Module) -> Mapping[str, AdaLoraConfig]:
    found = in_training(root)
    if not found:
        raise StateError("no AdaLoRA adapter runs and is trained; inject one, load one as trainable, or set_adapter")
    return found


def _mean(sites: Mapping[str, Params]) -> Tensor:
    """|A A^T - I| and |B^T B - I|, in Frobenius' norm, on average."""
    terms = []
    for p in sites.values():
        for values in (whole(p["A"]), whole(p["B"]).T):
            gram = values @ values.T  # [r, r]
            terms.append(torch.linalg.norm(gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device)))
    return torch.stack([term.to(terms[0].device) for term in terms]).mean()


def _allot(state: State, one: Trained, step: int) -> None:
    state.importance[one.name] = _observed(state.importance.get(one.name, {}), one)
    if step > one.config.tinit and step % one.config.deltaT == 0:
        _choose(state, one, step)


def _settle(state: State, one: Trained, step: int) -> None:
    """Ranks are allotted for the last time: at the step that ends it or, where that was left out, at a later one."""
    if one.name in state.importance:
        _choose(state, one, one.config.end)
        del state.importance[one.name]
    elif one.config.rank_pattern is None:
        raise StateError(
            f"adalora_step: step {step} is past the last that allots ranks, and none came before; "
            "call it from step 0 on"
        )
    else:
        _mask(one.config, one.sites)


def _observed(known: Mapping[str, Importance], one: Trained) -> Mapping[str, Importance]:
    """What is known of each tensor, with this step's gradients; one that the loss does not reach has none."""
    if all(values.grad is None for p in one.sites.values() for values in p.values()):
        raise StateError(
            f"adapter {printable(one.name)!r} has no gradients; adalora_step comes after loss.backward() and the "
            "optimizer's step, and before zero_grad"
        )
    found: dict[str, dict[str, Smoothed]] = {}
    with torch.no_grad():
        for site, p in one.sites.items():
            nothing = {role: Smoothed(torch.zeros_like(values), torch.zeros_like(values)) for role, values in p.items()}
            before = known.get(site, nothing)
            grads = {role: torch.zeros_like(v) if v.grad is None else v.grad for role, v in p.items()}
            found[site] = {role: before[role].and_then(v.detach(), grads[role], one.config) for role, v in p.items()}
    return found


def _choose(state: State, one: Trained, step: int) -> None:
    left = masks(state.importance[one.name], budget(one.config, step, len(one.sites)))
    told = replace(one.config, rank_pattern={f"{site}.lora_E": mask for site, mask in left.items()})
    state.configs[one.name] = told
    _mask(told, one.sites)


def _mask(config: AdaLoraConfig, sites: Mapping[str, Params]) -> None:
    """The singular values of the triplets that are gone become zero, also where they have grown again."""
    for name, p in sites.items():
        E = p["E"].detach()
        gone = ~torch.tensor(config.mask(name), device=E.device).unsqueeze(1)  # [r, 1]
        fill(E, whole(E).masked_fill(gone, 0))


def _refuse_reduced(sites: Mapping[str, Params], config: AdaLoraConfig) -> None:
    for name, p in sites.items():
        if len(p["E"]) != config.init_r:
            raise StateError(
                f"{printable(name)}: {len(p['E'])} triplets are left of {config.init_r}; ranks are allotted once; "
                "train this adapter without adalora_step"
            )
