"""On whole models of transformers: from files into memory, and merged into files."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from surgery.api.given import Where
from surgery.hosts.within import within
from surgery.integrations import transformers as hugging


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

    The base is the one that the adapter's config names, in the class of its task, or that either config names, or
    in `model_class`. Where no adapter lies, the model itself. `dtype` and `device_map` as in transformers;
    `quantization` "nf4", "fp4" or "int8", or a config of transformers such as BitsAndBytesConfig, holds the weights so
    from the start. No code of a repository is ever run.
    Raises InputError for what is not there or not known, EnvironmentFault without
    transformers or a network.
    """
    wanted = hugging.Wanted(model_class, dtype, device_map, quantization)
    return hugging.load_model(where, wanted, revision, subfolder, trainable)


def save_merged(model: nn.Module, folder: Where, *, overwrite: bool = False, **options: Any) -> None:
    """Write a model of transformers with its active adapters merged, as a plain checkpoint; the model stays as it is.

    transformers alone loads it, with no key missing or left over. `options` are those of its `save_pretrained`.
    Raises OutputExistsError if `folder` is there and `overwrite` is false, UsageError for a model of another kind,
    and as `merge` does.
    """
    hugging.save_merged(within(model), Path(folder), overwrite, **options)
