"""A trained bias: an adapter's, which takes the place of a module's own while that adapter runs.

As in PEFT it is found where the module's own was, so that the module computes with it unchanged; the one that does not
run is held beside it, so that it moves with the model.
"""

from torch import nn

from surgery.core.sharded import is_sharded
from surgery.errors import StateError

OWN, TRAINED = "bias_of_base", "bias_of_adapter"  # where the one that does not run is held


def own_bias(module: nn.Module) -> nn.Parameter | None:
    """The module's own, whichever runs; None if it has none that can be trained."""
    held = module._parameters.get(OWN, module._parameters.get("bias"))
    return held if held is not None and held.is_floating_point() else None


def trained_bias(module: nn.Module) -> nn.Parameter:
    """The adapter's, whichever runs."""
    held = module._parameters["bias" if OWN in module._parameters else TRAINED]
    assert held is not None
    return held


def run_bias(module: nn.Module, trained: bool) -> None:
    """The adapter's runs from now on, or else the module's own. StateError where each process holds a share."""
    here, beside = (TRAINED, OWN) if trained else (OWN, TRAINED)
    held = module._parameters
    if here not in held:
        return
    if any(is_sharded(values) for values in (held["bias"], held[here]) if values is not None):
        raise StateError(
            "each process holds a share of the biases, which cannot change their places then; switch adapters that "
            "train biases before fully_shard"
        )
    held[beside], held["bias"] = held["bias"], held.pop(here)


def forget_beside(module: nn.Module) -> None:
    """Only the one that runs is left."""
    for key in (OWN, TRAINED):
        module._parameters.pop(key, None)


def lift_bias(module: nn.Module) -> None:
    """The module is as it was."""
    run_bias(module, trained=False)
    module._parameters.pop(TRAINED, None)
