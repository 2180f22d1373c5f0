"""What AdaLoRA asks of a training loop."""

from torch import Tensor, nn

from surgery.hosts.within import within
from surgery.procedures.live import adalora


def adalora_step(model: nn.Module, step: int) -> None:
    """Allot the ranks of the AdaLoRA adapters in training; PEFT's `update_and_allocate`.

    To be called after the optimizer's step number `step`, counted from 0, and before `zero_grad`. Raises
    StateError without such an adapter or without gradients, ConfigError for a schedule that cannot be followed.
    """
    adalora.adalora_step(within(model), step)


def orthogonal_loss(model: nn.Module) -> Tensor:
    """AdaLoRA's regularizer, to be added to the loss before `backward`; a scalar.

    A model of transformers that is called with labels adds it to its own loss; there it must not be added again,
    and this raises UsageError.

    >>> import surgery, torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    >>> config = surgery.AdaLoraConfig(init_r=4, target_r=2, total_step=3, target_modules=["0"])
    >>> model, x = surgery.inject(model, config), torch.randn(8, 4)
    >>> optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    >>> for step in range(3):
    ...     loss = model(x).square().mean() + surgery.orthogonal_loss(model)
    ...     loss.backward()
    ...     optimizer.step()
    ...     surgery.adalora_step(model, step)
    ...     optimizer.zero_grad()
    """
    return adalora.orthogonal_loss(within(model))
