"""The public functions: each finds its inputs and calls one procedure."""

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from surgery.adapters.peft import open_adapter
from surgery.core.adapter import Weighted
from surgery.errors import UsageError, printable
from surgery.hosts.checkpoint import Checkpoint
from surgery.hosts.layout import shard_bytes
from surgery.integrations import transformers as hugging
from surgery.io.hub import locate, located
from surgery.procedures import adalora, adapter_files, publish, switch
from surgery.procedures import combine as combining
from surgery.procedures import diff as differing
from surgery.procedures import inject as injection
from surgery.procedures import inspect as inspection
from surgery.procedures import merge as live
from surgery.procedures import merge_checkpoint as merging
from surgery.procedures import mixed_batch as mixing
from surgery.procedures import plan as planning
from surgery.procedures import unmerge_checkpoint as unmerging
from surgery.procedures import verify as verifying
from surgery.procedures.combinations import Recipe
from surgery.procedures.configs import config_of
from surgery.procedures.filling import OnProgress, Pace

Model = TypeVar("Model", bound=nn.Module)
Where = str | PathLike[str]  # a path, or owner/name[@revision] on the Hub
Adapters = Where | Sequence[Where | tuple[Where, float]]  # one, or several in their order, each with a weight


def inject(model: Model, config: object, *, adapter_name: str = "default", trainable: bool = True) -> Model:
    """Lay a fresh adapter over the modules that `config` names, in place; returns the model.

    `config` is a config of surgery or peft, a dict of PEFT's fields, or the folder of an adapter. The rest
    of the model is frozen. The first adapter is active. Raises MatchError for an entry of target_modules
    that matches nothing, ConfigError, StateError.

    >>> import surgery, torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    >>> model = surgery.inject(model, surgery.LoraConfig(r=2, target_modules=["0"]))
    >>> [name for name, p in model.named_parameters() if p.requires_grad]
    ['0.lora_A.default.weight', '0.lora_B.default.weight']
    """
    injection.inject(model, config_of(config), adapter_name, lambda: hugging.output_heads(model), trainable)
    hugging.attach(model)
    return model


def load(model: Model, path: Where, *, adapter_name: str = "default", trainable: bool = False) -> Model:
    """Lay a saved adapter over the model, in place; returns the model.

    `path` is a folder, a file, or owner/name[@revision] on the Hub. The first adapter is active, later ones
    are not. Raises InputError unless every tensor of the adapter finds its place.
    """
    adapter_files.load(model, locate(path), adapter_name, trainable)
    hugging.attach(model)
    return model


def load_model(  # noqa: PLR0913  # as transformers' from_pretrained
    where: Where,
    *,
    model_class: Any = None,
    dtype: str | torch.dtype = "auto",
    device_map: Any = None,
    revision: str | None = None,
    subfolder: str | None = None,
    trainable: bool = False,
) -> Any:
    """A model of transformers with the adapter at `where`, a folder or owner/name on the Hub, laid over its base.

    The base is the one that the adapter's config names, in the class of its task, or that either config names, or
    in `model_class`. Where no adapter lies, the model itself. `dtype` and `device_map` as in transformers. No code
    of a repository is ever run. Raises InputError for what is not there or not known, EnvironmentFault without
    transformers or a network.
    """
    wanted = hugging.Wanted(model_class, dtype, device_map)
    return hugging.load_model(where, wanted, revision, subfolder, trainable)


def save(model: nn.Module, folder: Where, *, adapter_name: str | None = None) -> None:
    """Write the model's adapters as PEFT does: "default" into `folder`, others into sub-folders of their name."""
    adapter_files.save(model, Path(folder), None if adapter_name is None else [adapter_name])


def save_merged(model: nn.Module, folder: Where, *, overwrite: bool = False, **options: Any) -> None:
    """Write a model of transformers with its active adapters merged, as a plain checkpoint; the model stays as it is.

    transformers alone loads it, with no key missing or left over. `options` are those of its `save_pretrained`.
    Raises OutputExistsError if `folder` is there and `overwrite` is false, UsageError for a model of another kind,
    and as `merge` does.
    """
    hugging.save_merged(model, Path(folder), overwrite, **options)


def set_adapter(model: nn.Module, adapter_name: str | Sequence[str]) -> switch.Switched:
    """Run this adapter, or these in their order; a context manager that takes it back."""
    return switch.set_adapter(model, adapter_name)


def enable_adapters(model: nn.Module) -> switch.Switched:
    """Run the active adapters; a context manager that takes it back."""
    return switch.enable_adapters(model)


def disable_adapters(model: nn.Module) -> switch.Switched:
    """Run the base alone; a context manager that takes it back."""
    return switch.disable_adapters(model)


def mixed_batch(model: nn.Module, adapter_names: Sequence[str]) -> AbstractContextManager[None]:
    """A context in which each row of a batch runs under the adapter named for it, "__base__" for none.

    Rows are told by the first axis of each adapted layer's input. It takes part in training too, where backward
    belongs within it if activations are recomputed. Raises UsageError unless there is a name for each row,
    StateError for a name that is not there, while merged, and where rows cannot be told.

    >>> import surgery, torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    >>> for name in ("en", "fr"):
    ...     model = surgery.inject(model, surgery.LoraConfig(r=2, target_modules=["0"]), adapter_name=name)
    >>> with surgery.mixed_batch(model, ["en", "__base__", "fr"]):
    ...     y = model(torch.randn(3, 4))
    """
    return mixing.mixed_batch(model, adapter_names)


def merge(model: Model, *, undo: live.UndoKind = "index") -> Model:
    """Add the active adapters to the base weights, in place; `unmerge` brings them back to the bit.

    `undo` "index" stores a fraction of a bit a parameter; "copy" keeps the original weights.
    """
    live.merge(model, undo)
    return model


def unmerge(model: Model) -> Model:
    """The base weights as they were before `merge`, to the bit. StateError if they have changed since."""
    live.unmerge(model)
    return model


def eject(model: Model, *, keep_merged: bool = False) -> Model:
    """Put the model's own modules back, with their requires_grad flags; unmerges first unless `keep_merged`."""
    injection.eject(model, keep_merged)
    hugging.detach(model)
    return model


def adalora_step(model: nn.Module, step: int) -> None:
    """Allot the ranks of the AdaLoRA adapters in training; PEFT's `update_and_allocate`.

    To be called after the optimizer's step number `step`, counted from 0, and before `zero_grad`. Raises
    StateError without such an adapter or without gradients, ConfigError for a schedule that cannot be followed.
    """
    adalora.adalora_step(model, step)


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
    return adalora.orthogonal_loss(model)


def inspect(model: nn.Module | Where, *, sha256: bool = False) -> inspection.Inspection:
    """The sites of a model, in memory or from the headers of its files, or the tensors of an adapter.

    `sha256` asks for the hash that `expect_base_sha256` takes, for which all of the model's files are read.

    >>> import surgery, torch
    >>> [(row.name, row.op, row.shape) for row in surgery.inspect(torch.nn.Sequential(torch.nn.Linear(4, 2))).rows]
    [('0', 'linear', (2, 4))]
    """
    if isinstance(model, nn.Module):
        return inspection.inspect_model(model)
    return inspection.inspect(locate(model), sha256)


def plan(
    base: Where,
    adapters: Adapters,
    *,
    dtype: str | torch.dtype | None = None,
    tied: str = "refuse",
    ops: Mapping[str, str] | None = None,
) -> planning.Plan:
    """What a merge with these options would do, and all that stands against it. Writes nothing."""
    with _checkpoint(base) as source:
        return planning.make_plan(source, _weighted(adapters), planning.treatment(dtype, tied, ops))


def merge_checkpoint(  # noqa: PLR0913  # three things and their options
    base: Where,
    adapters: Adapters,
    out: Where,
    *,
    reversible: bool = False,
    dtype: str | torch.dtype | None = None,
    tied: str = "refuse",
    ops: Mapping[str, str] | None = None,
    max_shard_size: int | str | None = None,
    overwrite: bool = False,
    resume: bool | None = None,
    expect_base_sha256: str | None = None,
    expect_adapter_sha256: str | Sequence[str] | None = None,
    progress: OnProgress | None = None,
    push_to_hub: str | None = None,
    private: bool = False,
) -> merging.MergeReport:
    """Merge adapters over `base` into the new folder `out`, streaming; complete, or `out` stays as it is.

    `reversible` writes what `unmerge_checkpoint` needs; `dtype` casts all floats; `tied` "untie" writes a tied
    head apart where an adapter changes it or the embedding; `ops` says by the end of a name whether a square weight
    is "linear" or "conv1d"; `max_shard_size` is in bytes, or such as "5GB" (default: files as in the base).
    A run that was cut short is gone on with, unless `resume` is false. `progress` is called with a Progress as
    bytes are written, one call at a time. The expected hashes are those that the receipt and `inspect` tell.
    `push_to_hub` names a repository that OUT is then uploaded to, as the function of that name does.
    """
    if push_to_hub is not None:
        publish.check_hub_id(push_to_hub)
    elif private:
        raise UsageError("private: there is nothing to be private; push_to_hub names a repository")
    found = _weighted(adapters)
    merging.check_adapters(found, expect_adapter_sha256)
    merging.check_sha256(expect_base_sha256)
    options = merging.Options(
        planning.treatment(dtype, tied, ops),
        shard_bytes(max_shard_size),
        reversible=reversible,
        overwrite=overwrite,
        resume=resume,
        expect_base_sha256=expect_base_sha256,
        pace=Pace(progress=progress),
    )
    with _checkpoint(base) as source:
        report = merging.merge_checkpoint(source, found, Path(out), options)
    if push_to_hub is None:
        return report
    pushed = publish.push_merged(report.out, push_to_hub, private=private)
    return replace(report, pushed=f"{pushed.hub_id}@{pushed.commit}")


def push_to_hub(out: Where, repo: str, *, private: bool = False) -> publish.PushReport:
    """Upload a merged folder as one commit of `repo` ("owner/name") on the Hub, with a model card.

    The repository is made if there is none. Afterwards the hashes that the Hub states are compared with those of
    `out`, which stays as it is. Raises InputError for what the Hub refuses, CheckError if `out` is not what its
    receipt says, EnvironmentFault for the network. On the command line: `surgery push OUT REPO`.
    """
    return publish.push_to_hub(Path(out), repo, private=private)


def unmerge_checkpoint(
    merged: Where,
    out: Where,
    *,
    overwrite: bool = False,
    resume: bool | None = None,
    progress: OnProgress | None = None,
) -> unmerging.UnmergeReport:
    """Write the base of a reversible merge to `out`: the original bytes, checked by their sha256."""
    pace = Pace(progress=progress)
    return unmerging.unmerge_checkpoint(locate(merged), Path(out), overwrite=overwrite, resume=resume, pace=pace)


def verify_checkpoint(
    base: Where, adapters: Adapters | None = None, out: Where | None = None, *, ops: Mapping[str, str] | None = None
) -> verifying.VerifyReport:
    """Grade each tensor of `out` against `adapters` merged over `base`, whichever tool made it.

    With one argument, a merged folder, check its files against its receipt. `report.ok` is false where
    anything is different. `ops` as in `merge_checkpoint`. Raises InputError for what cannot be read, or has no receipt.
    """
    if out is None or adapters is None:
        return verifying.verify_receipt(locate(base))
    with _checkpoint(base) as source, Checkpoint(locate(out)) as found:
        return verifying.verify_checkpoint(source, _weighted(adapters), found, ops)


def combine(  # noqa: PLR0913  # the settings of all methods
    adapters: Adapters,
    out: Where,
    *,
    method: str = "cat",
    density: float | None = None,
    majority_sign_method: str | None = None,
    rank: int | None = None,
    seed: int | None = None,
    overwrite: bool = False,
) -> combining.CombineReport:
    """Write several LoRA adapters as one to the new folder `out`, in PEFT's format; tells its error, site by site.

    `method` is one of PEFT's add_weighted_adapter: "cat" (the exact sum), "svd" (of `rank`), "linear", "ties",
    "dare_linear", "dare_ties", "magnitude_prune" (with `density`; the two ties with `majority_sign_method`,
    dare with `seed`). Raises UsageError for a setting that the method has not, InputError for adapters that
    contradict each other or are no LoRA.
    """
    recipe = Recipe(method, density, majority_sign_method, rank, seed)
    return combining.combine(_weighted(adapters), Path(out), recipe, overwrite=overwrite)


def diff(a: Where, b: Where) -> differing.DiffReport:
    """What differs between two checkpoints, however each is cut into files; streaming.

    Of each tensor: absent, another shape or dtype, or other values, with their number, the largest absolute
    difference, the largest in ulps (of the dtype with fewer digits), ||a||, ||a - b|| and their ratio. What is
    no float64, float32, bfloat16 or float16 is compared by its bytes. Of config.json, the keys that differ.

    >>> import surgery, tempfile, torch
    >>> from safetensors.torch import save_file
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     a, b = f"{folder}/a.safetensors", f"{folder}/b.safetensors"
    ...     save_file({"weight": torch.ones(4)}, a)
    ...     save_file({"weight": torch.tensor([1.0, 1.0, 1.0, 1.5])}, b)
    ...     report = surgery.diff(a, b)
    >>> report.tensors["weight"].difference.max_abs_error
    0.5
    """
    with Checkpoint(locate(a)) as one, Checkpoint(locate(b)) as other:
        return differing.diff(one, other)


def _weighted(adapters: Adapters) -> list[Weighted]:
    """UsageError for a weight that is no finite number."""
    found = []
    for one in [adapters] if isinstance(adapters, str | PathLike) else adapters:
        where, weight = one if isinstance(one, tuple) else (one, 1.0)
        if not isinstance(weight, int | float) or not math.isfinite(weight):
            raise UsageError(f"{printable(where)}: its weight is {printable(weight)}; a finite number is wanted")
        place = located(where)
        adapter = replace(open_adapter(place.path), hub_id=place.hub_id, commit=place.commit)
        found.append(Weighted(adapter, float(weight)))
    return found


def _checkpoint(where: Where) -> Checkpoint:
    """Open, with what is known of where it came from."""
    place = located(where)
    found = Checkpoint(place.path)
    found.hub_id, found.commit = place.hub_id, place.commit
    return found
