"""On files: each function finds its inputs and calls one procedure."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Unpack

from surgery.api.given import (
    Adapters,
    Where,
    calibrated,
    checkpoint,
    is_adapter,
    merged_folder,
    refuse_swapped,
    weighted,
)
from surgery.errors import OutputExistsError, UsageError, printable
from surgery.hosts.layout import bytes_of
from surgery.io.hub import local_path
from surgery.procedures.planning import plan as planning
from surgery.procedures.planning.treatment import Treatment, TreatmentOptions, check_probes
from surgery.procedures.writing import merge_checkpoint as merging
from surgery.procedures.writing import publish
from surgery.procedures.writing import unmerge_checkpoint as unmerging
from surgery.procedures.writing.expected import check_adapters, check_sha256
from surgery.procedures.writing.filling import OnProgress, Pace


def plan(
    base: Where,
    adapters: Adapters,
    *,
    mha_out_proj_scale: int | None = None,
    **treatment: Unpack[TreatmentOptions],
) -> planning.Plan:
    """What a merge with these options would do, and all that stands against it. Writes nothing.

    It reads the headers of `base`, and the adapters. `treatment` as in `merge_checkpoint`: `dtype`, `tied`, `ops`,
    `compute_dtype`, `into`, `fallback`, `rounding`, `base_as` and `arithmetic`. Which weights fall back is known of a
    merge alone. Raises UsageError, and InputError for what cannot be read; what a merge would refuse is in `refusals`.

    >>> import surgery, tempfile, torch
    >>> from safetensors.torch import save_file
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_file(model.state_dict(), f"{folder}/base.safetensors")
    ...     surgery.save(surgery.inject(model, surgery.LoraConfig(r=2, target_modules=["0"])), f"{folder}/adapter")
    ...     plan = surgery.plan(f"{folder}/base.safetensors", f"{folder}/adapter")
    >>> plan.ok, len(plan.changes), plan.tensors
    (True, 1, 2)
    """
    wanted = Treatment.of(**treatment)
    refuse_swapped(base, adapters)
    with checkpoint(base) as source:
        return planning.make_plan(source, weighted(adapters, mha_out_proj_scale), wanted)


def merge_checkpoint(  # noqa: PLR0913  # three things and their options
    base: Where,
    adapters: Adapters,
    out: Where,
    *,
    reversible: bool = False,
    calibration: Where | None = None,
    probes: int = 0,
    min_retained: float | None = None,
    max_noise: float | None = None,
    mha_out_proj_scale: int | None = None,
    max_shard_size: int | str | None = None,
    overwrite: bool = False,
    resume: bool | None = None,
    expect_base_sha256: str | None = None,
    expect_adapter_sha256: str | Sequence[str] | None = None,
    progress: OnProgress | None = None,
    push_to_hub: str | None = None,
    private: bool = False,
    **treatment: Unpack[TreatmentOptions],
) -> merging.MergeReport:
    """Merge adapters over `base` into the new folder `out`, streaming; complete, or `out` stays as it is.

    `base` and adapters are folders, files, or owner/name[@revision] on the Hub. `adapters` is one, a pair of one and
    its weight, or a list of such, laid over one another in their order.

    What is written:

    - `dtype` casts all floats. `max_shard_size` is such as "5GB", or in bytes (default: files as in the base).
    - `tied` "untie" writes a tied head apart where an adapter changes it or the embedding; "refuse" is the default.
    - `reversible` adds what `unmerge_checkpoint` needs.
    - `push_to_hub` names a repository that OUT is then uploaded to, as the function of that name does.

    How the base and the adapters are read:

    - `ops` says by the end of a name whether a square weight is "linear" or "conv1d".
    - `base_as` names the format, one of those of `into` or "w4a16-asym", in which the adapters were trained over this
      plain base: the weights of their linear maps are merged as they read from it.
    - `mha_out_proj_scale` 1 or 2 says how often the delta of an attention layer's out_proj counts that a file holds;
      by default 2 up to its `peft_version` 0.21.2, with which such adapters were trained.
    - `expect_base_sha256` and `expect_adapter_sha256` refuse others; receipts and `inspect` tell the hashes.

    Quantized weights are decoded to `compute_dtype` (default: what the base computes in) and written plainly, in 16
    bits unless the base has no dtype of 16 bits.

    - `into` "keep" holds them as the base does, by its own scales. "nf4", "int8" and the other formats that
      docs/quantization.md lists hold all that transformers would quantize, of a plain base too, by new ones.
    - Either raises CheckError where less than `min_retained` (0.5) of the adapters' change is left of it, or what comes
      beside it is more than `max_noise` (1) of it. With `fallback` "16bit" such weights are written plainly instead.
    - `rounding` "feedback" looks for other codes than the nearest, where a LoRA looks at its inputs along few
      directions: more of its change is retained there, and more comes beside it elsewhere. `calibration`, a file or
      folder that `record_inputs` has written, says what inputs there are instead.
    - `probes` is a number of seeded inputs, half of whose energy lies along these directions, or such as are recorded:
      they tell the error of a weight's outputs, in proportion to the adapters' effect on them.

    `arithmetic` "peft" or "peft-safe" gives the bits of PEFT 0.21.2's
    `PeftModel.from_pretrained(base, adapter).merge_and_unload()`, without or with its `safe_merge`, for LoRA without
    DoRA, (IA)^3 and AdaLoRA; memory then grows with the largest weight. Raises ConfigError for others.

    A run that was cut short is gone on with, unless `resume` is false. `progress` is called with a Progress as
    bytes are written, one call at a time. Raises UsageError, InputError for what is refused, OutputExistsError,
    EnvironmentFault.

    >>> import surgery, tempfile, torch
    >>> from safetensors.torch import save_file
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    >>> config = surgery.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     base, adapter, out = f"{folder}/base.safetensors", f"{folder}/adapter", f"{folder}/merged"
    ...     save_file(model.state_dict(), base)
    ...     surgery.save(surgery.inject(model, config), adapter)
    ...     report = surgery.merge_checkpoint(base, (adapter, 0.5), out, reversible=True)
    ...     graded = surgery.verify_checkpoint(base, (adapter, 0.5), out)
    ...     restored = surgery.unmerge_checkpoint(out, f"{folder}/restored")
    >>> [change.site.weight.name for change in report.plan.changes], graded.tensors["0.weight"].grade
    (['0.weight'], 'bits')
    """
    if push_to_hub is not None:
        publish.check_hub_id(push_to_hub)
    elif private:
        raise UsageError("private: there is nothing to be private; push_to_hub names a repository")
    check_sha256(expect_base_sha256)
    wanted = Treatment.of(**treatment)
    options = merging.Options(
        wanted,
        bytes_of(max_shard_size, "max_shard_size"),
        reversible=reversible,
        overwrite=overwrite,
        resume=resume,
        expect_base_sha256=expect_base_sha256,
        probes=check_probes(probes),
        bounds=wanted.bounds(min_retained, max_noise, probes),
        pace=Pace(progress=progress),
    )
    refuse_swapped(base, adapters)
    if is_adapter(local_path(out)):
        raise OutputExistsError(f"{printable(out)}: it is an adapter, not OUT; name a new folder last")
    found = weighted(adapters, mha_out_proj_scale)
    check_adapters(found, expect_adapter_sha256)
    with calibrated(wanted, calibration) as wanted, checkpoint(base) as source:
        report = merging.merge_checkpoint(source, found, local_path(out), replace(options, treatment=wanted))
    return report if push_to_hub is None else _pushed(report, push_to_hub, private)


def _pushed(report: merging.MergeReport, repo: str, private: bool) -> merging.MergeReport:
    pushed = publish.push_merged(report.out, repo, private=private)
    return replace(report, pushed=f"{pushed.hub_id}@{pushed.commit}")


def push_to_hub(out: Where, repo: str, *, private: bool = False) -> publish.PushReport:
    """Upload a merged folder as one commit of `repo` ("owner/name") on the Hub, with a model card.

    The repository is made if there is none. Afterwards the hashes that the Hub states are compared with those of
    `out`, which stays as it is. Raises InputError for what the Hub refuses, CheckError if `out` is not what its
    receipt says, EnvironmentFault for the network. On the command line: `surgery push OUT REPO`.
    """
    return publish.push_to_hub(local_path(out), repo, private=private)


def unmerge_checkpoint(
    merged: Where,
    out: Where,
    *,
    overwrite: bool = False,
    resume: bool | None = None,
    progress: OnProgress | None = None,
) -> unmerging.UnmergeReport:
    """Write the base of a reversible merge to the new folder `out`: the original bytes, checked by their sha256.

    The base is not needed for it. `resume` and `progress` as in `merge_checkpoint`, which has an example. Raises
    InputError for a merge that was not reversible or has changed since, OutputExistsError, EnvironmentFault.
    """
    pace = Pace(progress=progress)
    folder = merged_folder(merged)
    return unmerging.unmerge_checkpoint(folder, local_path(out), overwrite=overwrite, resume=resume, pace=pace)
