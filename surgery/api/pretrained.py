"""On whole models of transformers: from files into memory, and merged into files."""

from typing import Any

import torch
from torch import nn

from surgery.api.given import Where
from surgery.hosts.within import within
from surgery.integrations import transformers as hugging
from surgery.io.hub import local_path


def load_model(  # noqa: PLR0913  # as transformers' from_pretrained
    where: Where,
    *,
    model_class: Any = None,
    dtype: str | torch.dtype = "auto",
    device_map: Any = None,
    quantization: Any = None,
    revision: str | None = None,
    subfolder: str | None = None,
    trainable: bool = False,
) -> Any:
    """A model of transformers with the adapter at `where`, a folder or owner/name on the Hub, laid over its base.

    The base is the one that the adapter's config names, in `model_class`, or else in the class of its task, or one that
    either config names. Where a model lies and no adapter, it is that model. No code of a repository is ever run.

    - `dtype` and `device_map` are as in transformers.
    - `quantization` "nf4", "fp4" or "int8", or a config of transformers such as BitsAndBytesConfig, holds the weights
      so from the start.
    - `revision` and `subfolder` are those of `where`. With `trainable` the adapter gets gradients.

    Raises InputError for what is not there or not known, EnvironmentFault without transformers or a network.

    >>> import surgery, tempfile
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     LlamaForCausalLM(LlamaConfig(vocab_size=8, **sizes)).save_pretrained(f"{folder}/base")
    ...     model = surgery.inject(surgery.load_model(f"{folder}/base"), surgery.LoraConfig(r=2))
    ...     surgery.save(model, f"{folder}/adapter")
    ...     again = surgery.load_model(f"{folder}/adapter")
    ...     surgery.save_merged(again, f"{folder}/merged")
    >>> again.active_adapters()
    ['default']
    """
    wanted = hugging.Wanted(model_class, dtype, device_map, quantization)
    return hugging.load_model(where, wanted, revision, subfolder, trainable)


def save_merged(model: nn.Module, folder: Where, *, overwrite: bool = False, **options: Any) -> None:
    """Write a model of transformers with its active adapters merged, as a plain checkpoint; the model stays as it is.

    transformers alone loads it, with no key missing or left over. `options` are those of its `save_pretrained`.
    Raises OutputExistsError if `folder` is there and `overwrite` is false, UsageError for a model of another kind,
    and as `merge` does. `load_model` has an example.
    """
    hugging.save_merged(within(model), local_path(folder), overwrite, **options)
