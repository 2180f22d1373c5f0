"""On files that are looked at, and stay as they are: each function finds its inputs and calls one procedure."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from surgery.api.given import Adapters, Where, calibrated, checkpoint, merged_folder, refuse_swapped, weighted
from surgery.errors import UsageError
from surgery.hosts.within import within
from surgery.integrations import transformers as hugging
from surgery.io.hub import locate
from surgery.procedures.checking import diff as differing
from surgery.procedures.checking import inspect as inspection
from surgery.procedures.checking import verify as verifying
from surgery.procedures.checking.outputs import Inputs
from surgery.procedures.checking.recorded import recorded, told_beside
from surgery.procedures.checking.verify_report import VerifyReport
from surgery.procedures.planning.treatment import check_probes


def inspect(model: nn.Module | Where, *, sha256: bool = False) -> inspection.Inspection:
    """The sites of a model, in memory or from the headers of its files, or the tensors of an adapter.

    `model` is a module, a folder, a file, or owner/name[@revision] on the Hub. `sha256` asks for the hash that
    `expect_base_sha256` takes, for which all of the model's files are read. Raises InputError where neither lies.

    >>> import surgery, torch
    >>> [(row.name, row.op, row.shape) for row in surgery.inspect(torch.nn.Sequential(torch.nn.Linear(4, 2))).rows]
    [('0', 'linear', (2, 4))]
    """
    if isinstance(model, nn.Module):
        return inspection.inspect_model(within(model))
    return inspection.inspect(locate(model), sha256)


def verify_checkpoint(  # noqa: PLR0913  # three things and their options
    base: Where,
    adapters: Adapters | None = None,
    out: Where | None = None,
    *,
    ops: Mapping[str, str] | None = None,
    compute_dtype: str | torch.dtype | None = None,
    base_as: str | None = None,
    arithmetic: str | None = None,
    mha_out_proj_scale: int | None = None,
    calibration: Where | None = None,
    probes: int = 0,
    outputs: bool = False,
    inputs: Inputs | None = None,
    layers: bool = False,
) -> VerifyReport:
    """Grade each tensor of `out` against `adapters` merged over `base`, whichever tool made it.

    With one argument, a merged folder, its files are checked against its receipt. `report.ok` is false where anything
    is different; see VerifyReport for the grades.

    - `ops`, `compute_dtype`, `base_as`, `arithmetic` and `mha_out_proj_scale` are as in `merge_checkpoint`, by default
      those that the receipt of `out` tells, if it has one; the report says which it has taken, and which contradict
      it. `probes` is as there too.
    - `calibration` is wanted where that receipt tells of one, and has to be the same.
    - `outputs` also runs both as models of transformers, one at a time, in float64, and compares what they give with
      the noise of a run of `out` in its own dtype, and with the adapter's effect. `inputs` are keyword arguments of
      forward, by default made from the config, seeded. Padding, by `attention_mask`, is left out.
    - `layers` also compares what each adapted module gives, which tells where the two part.

    Raises UsageError, InputError for what cannot be read or has no receipt, EnvironmentFault where outputs are asked
    for without transformers. `merge_checkpoint` has an example.
    """
    derivation: dict[str, object] = {"ops": ops, "compute_dtype": compute_dtype, "base_as": base_as}
    derivation |= {"arithmetic": arithmetic, "mha_out_proj_scale": mha_out_proj_scale, "calibration": calibration}
    derivation |= {"probes": check_probes(probes)}
    _check_outputs(outputs, layers or inputs is not None, base_as)
    if out is None or adapters is None:
        _check_alone(out is None and adapters is None, outputs, [name for name, given in derivation.items() if given])
        return verifying.verify_receipt(merged_folder(base))
    refuse_swapped(base, adapters)
    with checkpoint(base) as source, checkpoint(out) as found:
        told = recorded(found.folder)
        treatment, notes = told.treatment(
            ops=ops or {}, compute_dtype=compute_dtype, base_as=base_as, arithmetic=arithmetic
        )
        _check_outputs(outputs, layers or inputs is not None, treatment.base_as)
        if outputs:
            hugging.refuse_uncompared(source, found)
        scale, said = told.out_proj_scale(mha_out_proj_scale)
        given = weighted(adapters, scale)
        with calibrated(treatment, calibration) as treatment:
            told.require_calibration(treatment)
            with told_beside((*notes, *said)):
                report = verifying.verify_checkpoint(source, given, found, treatment, probes=probes)
        report = replace(report, notes=(*notes, *said))
        return replace(report, outputs=hugging.agreements(source, given, found, inputs, layers)) if outputs else report


def _check_outputs(outputs: bool, detailed: bool, base_as: str | None) -> None:
    """UsageError where a run of the models is asked for that cannot be, or how to run them and no run."""
    if detailed and not outputs:
        raise UsageError("verify: `layers`, and inputs, are for a run of the models; give `outputs` too")
    if outputs and base_as is not None:
        raise UsageError(
            "verify: `outputs` are of plain models, and `base_as` makes the base none; leave `outputs` out"
        )


def _check_alone(alone: bool, outputs: bool, derivation: Sequence[str]) -> None:
    """UsageError unless one folder is given, and nothing is asked of it that takes the merge to be derived anew."""
    if not alone:
        raise UsageError("verify: one of adapters and OUT is missing; name BASE, adapters and OUT, or OUT alone")
    if outputs:
        raise UsageError(
            "verify: `outputs` are compared with those of adapters over a base; name base and adapters too"
        )
    if derivation:
        raise UsageError(
            f"verify: {' and '.join(f'`{name}`' for name in derivation)} given, which only a merge that is derived "
            "anew takes into account; name base and adapters too"
        )


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
    with checkpoint(a) as one, checkpoint(b) as other:
        return differing.diff(one, other)
