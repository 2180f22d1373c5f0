"""AdapterTrainer: what transformers' Trainer lacks to resume a model with adapters, and to load its best one."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from surgery.adapters.peft import read_adapter
from surgery.errors import UsageError, printable
from surgery.hosts.tree import state_of
from surgery.integrations.transformers.adalora import with_regularizer
from surgery.procedures.live.adalora_progress import read_progress, read_reduced, with_open_ranks, write_progress
from surgery.procedures.live.refill import refill
from surgery.procedures.live.save import active_folders
from surgery.procedures.live.switch import refuse_untrained


class AdapterTrainer:
    """A mixin for Trainer or any subclass of it; a model without adapters of surgery is trained as ever.

    Trainer saves a model with adapters by itself, but loads checkpoints back into models of peft only.

    >>> from transformers import Trainer
    >>> class MyTrainer(AdapterTrainer, Trainer):
    ...     "Trains, saves, resumes and loads the best model, of each the adapter alone."
    """

    def __init_subclass__(cls, **named: Any) -> None:
        """UsageError where a Trainer comes before the mixin, which nothing would call then."""
        super().__init_subclass__(**named)
        before = cls.__mro__[: cls.__mro__.index(AdapterTrainer)]
        deaf = [kind for kind in before if "_load_from_checkpoint" in vars(kind) and AdapterTrainer not in kind.__mro__]
        if deaf:
            raise UsageError(
                f"{printable(cls.__name__)}: {printable(deaf[0].__name__)} stands before AdapterTrainer, so that it "
                f"would go unheard; write class {printable(cls.__name__)}(surgery.AdapterTrainer, ...)"
            )

    def __init__(self, *given: Any, **named: Any) -> None:
        from surgery.integrations.transformers.callback import AdaLoraCallback

        super().__init__(*given, **named)
        handler: Any = self.callback_handler  # type: ignore[attr-defined]  # Trainer's
        if not any(isinstance(one, AdaLoraCallback) for one in handler.callbacks):
            handler.add_callback(AdaLoraCallback())

    def train(self: Any, *given: Any, **named: Any) -> Any:
        """As ever. StateError where no gradient would reach what is to be trained."""
        mine = _mine(self, self.model)
        if mine is not None:
            refuse_untrained(mine)
        return super().train(*given, **named)  # type: ignore[misc]

    def compute_loss(self: Any, model: Any, inputs: Any, *given: Any, **named: Any) -> Any:
        """As ever; of an AdaLoRA in training with its regularizer, once for each step of the optimizer."""
        compute = partial(super().compute_loss, model, inputs, *given, **named)  # type: ignore[misc]
        mine = _mine(self, self.model)
        return compute() if mine is None else with_regularizer(mine, compute, _parts(self, named))

    def _save_optimizer_and_scheduler(self: Any, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]
        mine = _mine(self, self.model)
        if mine is not None and self.args.should_save:
            places = active_folders(mine, Path(output_dir))
            for name in with_open_ranks(mine):
                write_progress(mine, name, places[name])

    def _load_from_checkpoint(self: Any, resume_from_checkpoint: str, model: Any = None) -> None:
        mine = _mine(self, self.model if model is None else model)
        if mine is None:
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]
        else:
            load_checkpoint(mine, Path(resume_from_checkpoint), read_progress)

    def _load_best_model(self: Any) -> None:
        mine = _mine(self, self.model)
        if mine is None:
            super()._load_best_model()  # type: ignore[misc]
        else:
            load_checkpoint(mine, Path(self.state.best_model_checkpoint), read_reduced)


def load_checkpoint(root: nn.Module, folder: Path, read_open: Callable[[nn.Module, str, Path], None]) -> None:
    """Put the adapters that a checkpoint holds into those of the model that are active, in place.

    `read_open` does so for an AdaLoRA whose ranks are being allotted.
    """
    open_ranks = with_open_ranks(root)
    for name, place in active_folders(root, folder).items():
        if name in open_ranks:
            read_open(root, name, place)
        else:
            refill(root, read_adapter(place), name)


def _parts(trainer: Any, told: Mapping[str, Any]) -> int:
    """How many losses are summed for a step: as many as are accumulated, unless Trainer divides each by their number.

    It does where the loss is a mean of its own batch, not of all items of the step.
    """
    summed = getattr(trainer, "loss_is_scaled_for_ga", None)
    if summed is None:
        of_all = trainer.model_accepts_loss_kwargs and told.get("num_items_in_batch") is not None
        summed = of_all or trainer.compute_loss_func is not None
    # Trainer has none before it trains, and what is computed then is no part of a step.
    return getattr(trainer, "current_gradient_accumulation_steps", 1) if summed else 1


def _mine(trainer: Any, model: Any) -> nn.Module | None:
    """The model with adapters that is trained. None for another, and where the whole run is saved sharded."""
    root: nn.Module = trainer.accelerator.unwrap_model(model, keep_torch_compile=False)
    sharded = trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled
    return None if sharded or state_of(root) is None else root
