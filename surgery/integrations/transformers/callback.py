"""AdaLoraCallback: what allots AdaLoRA's ranks after each step of transformers' Trainer."""

from typing import Any

from surgery.errors import EnvironmentFault, UsageError, printable
from surgery.methods.adalora_config import AdaLoraConfig
from surgery.procedures.live.adalora import adalora_step, in_training
from surgery.procedures.live.adalora_progress import with_open_ranks

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise EnvironmentFault('AdaLoraCallback: transformers is missing; pip install "model-surgery[hf]"') from error


class AdaLoraCallback(TrainerCallback):
    """For a Trainer without AdapterTrainer, which has it already; other models are trained as ever.

    >>> from transformers import Trainer
    >>> trainer = lambda **given: Trainer(callbacks=[AdaLoraCallback()], **given)
    """

    def on_train_begin(self, args: Any, state: Any, *_: Any, model: Any = None, **rest: Any) -> None:  # noqa: ARG002  # Trainer's
        """UsageError where gradients are sharded, so that no process has them whole, and where ranks would not fall."""
        open_ranks = with_open_ranks(model)
        if open_ranks and (args.deepspeed or args.fsdp):
            raise UsageError("AdaLoRA: DeepSpeed and FSDP shard gradients, by which ranks are allotted; train without")
        configs = in_training(model)
        for name in open_ranks:
            check_length(name, configs[name], state.max_steps)

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


def check_length(adapter: str, config: AdaLoraConfig, steps: int) -> None:
    """UsageError for a training that ends before the ranks have fallen to `target_r`."""
    config.check_schedule()
    if config.end > steps:
        raise UsageError(
            f"adapter {printable(adapter)!r}: its ranks fall until step {config.end}, total_step - tfinal, and this "
            f"training has {steps} steps; train for as many, or inject it with total_step={steps}"
        )
