"""AdapterMethods: what transformers' documentation calls on a model with adapters, without peft.

Names, arguments and the kinds of errors are those of the methods that transformers 5 has, and that need peft.
"""

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from surgery.adapters.sorting import PREFIX
from surgery.core.config import AdapterConfig
from surgery.core.sharded import has_shares
from surgery.errors import StateError, UsageError, printable
from surgery.hosts.tree import injected, state_of
from surgery.integrations.transformers.adalora import regularized
from surgery.integrations.transformers.default_targets import with_default_targets
from surgery.integrations.transformers.model import output_heads, room_of
from surgery.integrations.transformers.peft_methods import PeftMethods
from surgery.integrations.transformers.saving import save_merged
from surgery.integrations.transformers.sources import given
from surgery.procedures.live import switch
from surgery.procedures.live.inject import Start, inject
from surgery.procedures.live.load import LayOptions, lay
from surgery.procedures.live.mixed_batch import mixed_batch
from surgery.procedures.live.refill import refill
from surgery.procedures.live.remove import remove
from surgery.procedures.live.save import DEFAULT, active_folders, tensors_of, write
from surgery.procedures.places.configs import config_of, is_peft_s

LOADED = "_hf_peft_config_loaded"  # by it transformers and its Trainer know a model with adapters

_PUSHING = ("commit_message", "private", "create_pr")
_SAVING = frozenset({*_PUSHING, "repo_id", "safe_serialization", "save_function", "save_original_format"})


class Loaded(NamedTuple):
    """What transformers tells of a load; nothing is ever missing or left over, for that is refused."""

    missing_keys: frozenset[str] = frozenset()
    unexpected_keys: frozenset[str] = frozenset()
    mismatched_keys: frozenset[str] = frozenset()
    error_msgs: tuple[str, ...] = ()


class AdapterMethods(PeftMethods):
    """The methods. StateError, which is a ValueError, where the model has no adapter, or not that one."""

    def __call__(self, *given: Any, adapter_names: Sequence[str] | None = None, **named: Any) -> Any:
        """As ever; each row under the adapter named for it, if so told.

        An AdaLoRA adapter in training adds its regularizer to the loss.
        """
        if adapter_names is not None:
            refuse_recomputing(self)
            with mixed_batch(self, adapter_names):
                return super().__call__(*given, **named)
        return regularized(self, super().__call__(*given, **named), given, named)

    @property
    def peft_config(self) -> dict[str, AdapterConfig]:
        """The config of each adapter."""
        state = state_of(self)
        return {} if state is None else state.configs

    def add_adapter(self, adapter_config: object, adapter_name: str | None = None) -> None:
        """Lay a fresh adapter over the model, to be trained; from now on it runs, and no other.

        `adapter_config` is a config of surgery or peft, a dict of PEFT's fields, or the folder of an adapter.
        """
        name, as_peft = adapter_name or DEFAULT, is_peft_s(adapter_config)
        config = with_default_targets(self, config_of(adapter_config), as_peft)
        inject(self, config, name, Start(lambda: output_heads(self), as_peft))
        self.set_adapter(name)

    def load_adapter(  # noqa: PLR0913, PLR0917  # transformers' arguments
        self,
        peft_model_id: str | PathLike[str] | None = None,
        adapter_name: str | None = None,
        peft_config: object | None = None,
        adapter_state_dict: Mapping[str, Tensor] | None = None,
        low_cpu_mem_usage: bool = False,  # noqa: ARG002  # memory is low always
        is_trainable: bool = False,
        hotswap: bool | Literal["auto"] = "auto",
        local_files_only: bool = False,
        adapter_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Loaded:
        """Lay a saved adapter over the model; from now on it runs, and no other.

        `peft_model_id` is a folder or an id on the Hub, of which `revision` and `subfolder` may be given; or else
        `peft_config` and `adapter_state_dict` are the adapter. `hotswap=True` puts its tensors into the adapter of
        that name, in place: what is compiled stays so. After `enable_peft_hotswap(target_rank)`, which transformers'
        models have, and which is to be called before the first load, the two may be of any rank up to that and of any
        alpha, and "auto" swaps where the name is taken.
        """
        options = {**(adapter_kwargs or {}), **kwargs, "local_files_only": local_files_only}
        name, adapter = adapter_name or DEFAULT, given(peft_model_id, peft_config, adapter_state_dict, options)
        room = room_of(self)
        if hotswap is True or (hotswap == "auto" and room is not None and name in self.peft_config):
            refill(self, adapter, name)
        else:
            lay(self, adapter, name, is_trainable, LayOptions(room=room))
            self.set_adapter(name)
        if not is_trainable:
            self.eval()
        return Loaded()

    def set_adapter(self, adapter_name: str | Sequence[str]) -> None:
        """Run this adapter, or these in their order; of all adapters only they are trained, if they were to be."""
        switch.set_adapter(self, adapter_name)
        switch.train_running(self)

    def enable_adapters(self) -> switch.Switched:
        """Run the active adapters; a context manager that takes it back."""
        return switch.enable_adapters(self)

    def disable_adapters(self) -> switch.Switched:
        """Run the base alone; a context manager that takes it back."""
        return switch.disable_adapters(self)

    def active_adapters(self) -> list[str]:
        """The adapters that run, in their order."""
        return list(injected(self).active)

    def get_adapter_state_dict(
        self, adapter_name: str | None = None, state_dict: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """An adapter's tensors by PEFT's names; of the first active one, if none is named."""
        name = adapter_name or next(iter(injected(self).active), None)
        if name is None:
            raise StateError("no adapter is active; name one, or set_adapter first")
        injected(self).require(name)
        return {key: values.detach() for key, values in tensors_of(self, name, state_dict).items()}

    def delete_adapter(self, adapter_names: str | Sequence[str]) -> None:
        """Take adapters away for good; none is put in the place of an active one."""
        remove(self, [adapter_names] if isinstance(adapter_names, str) else adapter_names)
        self.tell_transformers()

    def save_pretrained(  # noqa: PLR0913, PLR0917  # transformers' arguments
        self,
        save_directory: str | PathLike[str],
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        push_to_hub: bool = False,
        max_shard_size: int | str = "50GB",
        variant: str | None = None,
        token: str | bool | None = None,
        save_peft_format: bool = True,
        **kwargs: Any,
    ) -> None:
        """Write the active adapter as PEFT's files; of several, each into a sub-folder of its name.

        An adapter is one file, whatever `max_shard_size` and `variant` say. Without adapters, the model itself.
        """
        if not self.tell_transformers():
            return super().save_pretrained(  # type: ignore[misc, no-any-return]
                save_directory, is_main_process, state_dict, push_to_hub, max_shard_size, variant, token, **kwargs
            )
        if push_to_hub and not (state_dict is None and save_peft_format):
            raise UsageError(
                "save_pretrained: push_to_hub pushes the model's own tensors by PEFT's names; save, then push"
            )
        if unknown := sorted(name for name, value in kwargs.items() if name not in _SAVING and value):
            raise UsageError(
                f"save_pretrained: {printable(unknown[0])} is nothing that saving an adapter knows; leave it out"
            )
        folder = Path(save_directory)
        if is_main_process or has_shares(self):  # what is in shares takes all processes to save
            prefix = PREFIX if save_peft_format else ""
            for name, place in active_folders(self, folder).items():
                write(self, place, name, state_dict, prefix)
        if push_to_hub and is_main_process:
            hub_options = {name: kwargs[name] for name in _PUSHING if name in kwargs}
            push: Any = self.push_to_hub
            push(kwargs.get("repo_id") or folder.name, token=token, **hub_options)
        return None

    def save_merged(self, save_directory: str | PathLike[str], overwrite: bool = False, **options: Any) -> None:
        """Write the model with its active adapters merged, as transformers alone loads it; see surgery.save_merged."""
        save_merged(self, Path(save_directory), overwrite, **options)

    def tell_transformers(self) -> bool:
        """Whether the model has adapters, which transformers and its Trainer ask by an attribute."""
        state = state_of(self)
        found = self.__dict__[LOADED] = state is not None and bool(state.configs)
        return found


def refuse_recomputing(root: nn.Module) -> None:
    """UsageError where backward would compute activations again, when the rows' adapters are no longer known."""
    recomputes = any(getattr(module, "gradient_checkpointing", False) for module in root.modules())
    if root.training and torch.is_grad_enabled() and recomputes:
        raise UsageError(
            "adapter_names: with gradient checkpointing, backward runs the layers again after the call; "
            "use `with surgery.mixed_batch(model, adapter_names):` around both"
        )
