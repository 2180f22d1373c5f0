"""Generating: `generate` of a model with adapters, one of them for each row if so told."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

from surgery.integrations.transformers.methods import AdapterMethods
from surgery.procedures.live.mixed_batch import mixed_batch, repeat_rows, rows_kept


class Generating(AdapterMethods):
    """The methods, for a model that generates."""

    def generate(self, *given: Any, adapter_names: Sequence[str] | None = None, **named: Any) -> Any:
        """As ever; each row, and all that is made of it, under the adapter named for it, "__base__" for none."""
        with mixed_batch(self, adapter_names) if adapter_names is not None else nullcontext(), rows_kept(self):
            return super().generate(*given, **named)  # type: ignore[misc]

    def _expand_inputs_for_generation(self, *given: Any, expand_size: int = 1, **named: Any) -> Any:
        """Where transformers repeats rows, for beams or several outcomes, after the encoder has seen each once."""
        repeat_rows(self, expand_size)
        return super()._expand_inputs_for_generation(*given, expand_size=expand_size, **named)  # type: ignore[misc]
