"""PeftMethods: what users of peft call on its models besides, by the same names and to the same ends."""

from collections.abc import Sequence
from contextlib import ExitStack
from math import prod
from typing import Any

from torch import nn

from surgery.errors import StateError, printable
from surgery.hosts.quantized import is_quantized, shape_of_layer
from surgery.integrations.transformers.model import output_heads
from surgery.integrations.transformers.quantizing import tell_ejected
from surgery.layers import Adapted, Replaced
from surgery.procedures.live import switch
from surgery.procedures.live.eject import eject
from surgery.procedures.live.held_layers import Landing
from surgery.procedures.live.in_place import UndoKind
from surgery.procedures.live.merge import merge, unmerge
from surgery.procedures.planning.treatment import Treatment


class PeftMethods(nn.Module):
    """The methods; those that peft returns a model from work in place, and return this one."""

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """How many numbers are trained, and how many there are; a quantized weight counts as decoded."""
        sizes = {id(one): one.numel() for one in self.parameters()}
        sizes |= {id(one.weight): prod(shape_of_layer(one)) for one in self.modules() if is_quantized(one)}
        return sum(sizes[id(one)] for one in self.parameters() if one.requires_grad), sum(sizes.values())

    def print_trainable_parameters(self) -> None:
        """Print how many numbers are trained, and how many there are."""
        trained, there = self.get_nb_trainable_parameters()
        print(f"trainable params: {trained:,} || all params: {there:,} || trainable%: {100 * trained / there:.4f}")

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> Any:
        """As ever. StateError where the size changes, and an adapter lies over the embedding of tokens or the head."""
        if new_num_tokens is not None or pad_to_multiple_of is not None:
            step = pad_to_multiple_of or 1
            _refuse_resizing(self, new_num_tokens, step)
        resized: Any = super().resize_token_embeddings  # type: ignore[misc]
        return resized(new_num_tokens, pad_to_multiple_of, mean_resizing)

    def tie_weights(self, *given: Any, **named: Any) -> Any:
        """As ever. What adapters lie over stays as it is: a tied weight was so before them, and is."""
        tied: Any = getattr(self, "all_tied_weights_keys", None) or {}
        modules = {name.rpartition(".")[0] for pair in tied.items() for name in pair}
        if any(isinstance(self.get_submodule(name), Adapted | Replaced) for name in modules):
            return None
        return super().tie_weights(*given, **named)  # type: ignore[misc]

    def disable_adapter(self) -> switch.Switched:
        """Run the base alone; a context manager that takes it back."""
        return switch.disable_adapters(self)

    def merge_adapter(
        self,
        adapter_names: str | Sequence[str] | None = None,
        safe_merge: bool = False,  # noqa: ARG002  # what is not finite is always refused
        undo: UndoKind = "index",
        into: str | None = None,
    ) -> None:
        """Add the active adapters, or those named, which are active then, to the base weights; see surgery.merge."""
        with ExitStack() as taken_back:
            if adapter_names is not None:
                taken_back.enter_context(switch.set_adapter(self, adapter_names))
            merge(self, undo, Landing(Treatment.of(into=into), heads=output_heads(self)))
            taken_back.pop_all()

    def unmerge_adapter(self) -> None:
        """The base weights as they were before `merge_adapter`, to the bit."""
        unmerge(self)

    def merge_and_unload(
        self,
        progressbar: bool = False,  # noqa: ARG002  # nothing is shown
        safe_merge: bool = False,  # noqa: ARG002  # what is not finite is always refused
        adapter_names: str | Sequence[str] | None = None,
        into: str | None = None,
    ) -> Any:
        """Add the active adapters, or those named, to the weights for good, and take all adapters out."""
        self.merge_adapter(adapter_names, into=into)
        return self._bare(keep_merged=True)

    def unload(self) -> Any:
        """Take all adapters out; the weights are those of the base, to the bit."""
        return self._bare(keep_merged=False)

    def _bare(self, keep_merged: bool) -> Any:
        from surgery.integrations.transformers.subclass import detach

        eject(self, keep_merged)
        detach(self)
        if keep_merged:
            tell_ejected(self)
        return self


def _refuse_resizing(root: Any, wanted: int | None, step: int) -> None:
    """StateError where an adapter's tensors have a number for each token that there was."""
    tokens = -(-(_tokens(root.get_input_embeddings()) if wanted is None else wanted) // step) * step
    ends = {id(one) for one in (root.get_input_embeddings(), root.get_output_embeddings())}
    for name, module in root.named_modules():
        if id(module) in ends and isinstance(module, Adapted | Replaced) and _tokens(module) != tokens:
            raise StateError(
                f"resize_token_embeddings: an adapter lies over {printable(name)}, of {_tokens(module)} tokens; "
                "resize the model first, then inject"
            )


def _tokens(module: Any) -> int:
    return len(module.base_weight if isinstance(module, Adapted) else module.weight)
