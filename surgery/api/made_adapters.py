"""Adapters made of others, or of two models, on files."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from surgery.api.given import Adapters, Where, checkpoint, weighted
from surgery.procedures.making import combine as combining
from surgery.procedures.making import extract as extraction
from surgery.procedures.making.combinations import Recipe
from surgery.procedures.making.low_rank import Truncation


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
    return combining.combine(weighted(adapters), Path(out), recipe, overwrite=overwrite)


def extract(  # noqa: PLR0913  # three things and their options
    base: Where,
    tuned: Where,
    out: Where,
    *,
    rank: int | None = None,
    energy: float | None = None,
    targets: Sequence[str] | None = None,
    rest: extraction.Rest = "refuse",
    ops: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> extraction.ExtractReport:
    """Write what the checkpoint `tuned` has over `base` as a LoRA adapter to the new folder `out`, in PEFT's format.

    Each matrix that changed, or those whose module's name ends in one of `targets`, becomes about the best B A of at
    most `rank`, and of no more than holds `energy` of the change's squared norm; the report tells its error, of the
    float32 factors as written. Experts that are one parameter in memory are a site of `target_parameters`, with
    factors for each, of the rank of the one that needs most. Other changes are refused, or with `rest` "save" whole
    modules of the adapter, or with "drop" left out. `ops` tells "embedding", "linear" or "conv1d" by the end of a
    module's name where the names mislead, and of a stack [experts, out, in] "linear", [experts, in, out] "conv1d",
    where the family does not tell. Raises UsageError, InputError for checkpoints of other names or shapes.
    """
    wanted = extraction.Extraction(Truncation(rank, energy), targets, rest, ops or {})
    with checkpoint(base) as before, checkpoint(tuned) as after:
        return extraction.extract(before, after, Path(out), wanted, overwrite=overwrite)
