"""AdaLoraCallback: what allots AdaLoRA's ranks after each step of transformers' Trainer."""

from typing import Any

from surgery.errors import EnvironmentFault, UsageError
from surgery.procedures.adalora import adalora_step
from surgery.procedures.adalora_progress import with_open_ranks

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise EnvironmentFault('AdaLoraCallback: transformers is missing; pip install "model-surgery[hf]"') from error


class AdaLoraCallback(TrainerCallback):
    """For a Trainer without AdapterTrainer, which has it already; other models are trained as ever.

    >>> from transformers import Trainer
    >>> trainer = lambda **given: Trainer(callbacks=[AdaLoraCallback()], **given)
    """

    def on_train_begin(self, args: Any, *_: Any, model: Any = None, **rest: Any) -> None:  # noqa: ARG002  # Trainer's
        """UsageError where gradients are sharded, so that no process has them whole."""
        if with_open_ranks(model) and (args.deepspeed or args.fsdp):
            raise UsageError("AdaLoRA: DeepSpeed and FSDP shard gradients, by which ranks are allotted; train without")

    def on_optimizer_step(
        self,
        args: Any,  # noqa: ARG002  # Trainer's arguments
        state: Any,
        *_: Any,
        model: Any = None,
        optimizer: Any = None,
        **rest: Any,  # noqa: ARG002  # as above
    ) -> None:
        """Unless the optimizer itself has left the step out, for gradients that were not finite."""
        if with_open_ranks(model) and not optimizer.step_was_skipped:
            adalora_step(model, state.global_step)
