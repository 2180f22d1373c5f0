"""Adapters made of others, or of two models, on files."""

from collections.abc import Mapping, Sequence

from surgery.api.given import Adapters, Where, checkpoint, weighted
from surgery.io.hub import local_path
from surgery.procedures.making import combine as combining
from surgery.procedures.making import extract as extracting
from surgery.procedures.making.changes import Extraction, Rest
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

    `adapters` are as in `merge_checkpoint`. `method` is one of PEFT's add_weighted_adapter:

    - "cat" is the exact sum; its rank is the sum of theirs.
    - "svd" is about the best of `rank` to that sum.
    - "linear" adds up A and B.
    - "ties", "dare_linear", "dare_ties" and "magnitude_prune" do so with `density` of their elements. The two ties take
      `majority_sign_method` ("total" or "frequency"), dare takes `seed`.

    Raises UsageError for a setting that the method has not, InputError for adapters that contradict each other or are
    no LoRA, OutputExistsError, EnvironmentFault.

    >>> import surgery, tempfile, torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for name in ("en", "fr"):
    ...         config = surgery.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    ...         surgery.save(surgery.inject(model, config, adapter_name=name), folder, adapter_name=name)
    ...     made = surgery.combine([(f"{folder}/en", 0.7), (f"{folder}/fr", 0.3)], f"{folder}/both")
    >>> made.sites["0"].r, made.relative_error < 1e-6
    (4, True)
    """
    recipe = Recipe(method, density, majority_sign_method, rank, seed)
    return combining.combine(weighted(adapters), local_path(out), recipe, overwrite=overwrite)


def extract(  # noqa: PLR0913  # three things and their options
    base: Where,
    tuned: Where,
    out: Where,
    *,
    rank: int | None = None,
    energy: float | None = None,
    targets: Sequence[str] | None = None,
    rest: Rest = "refuse",
    ops: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> extracting.ExtractReport:
    """Write what the checkpoint `tuned` has over `base` as a LoRA adapter to the new folder `out`, in PEFT's format.

    Each matrix that changed becomes about the best B A of at most `rank`, and of no higher rank than holds `energy`, a
    fraction, of the change's squared norm. The report tells the error of the float32 factors as written.

    - `targets` are the ends of the names of the modules that are taken; by default all that changed.
    - `rest` is what becomes of other changes: "refuse", "save" them as whole modules of the adapter, or "drop" them.
    - `ops` tells "embedding", "linear" or "conv1d" by the end of a module's name, where the names mislead; and of a
      stack of experts whose family is not known "linear" for [experts, out, in], "conv1d" for [experts, in, out].
    - Experts that are one parameter in memory are a site of `target_parameters`, with factors for each expert, of the
      rank of the one that needs most.

    Raises UsageError, InputError for checkpoints of other names or shapes, OutputExistsError, EnvironmentFault.

    >>> import surgery, tempfile, torch
    >>> from safetensors.torch import save_file
    >>> base = {"0.weight": torch.randn(8, 8)}
    >>> tuned = {"0.weight": base["0.weight"] + torch.randn(8, 1) @ torch.randn(1, 8)}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_file(base, f"{folder}/base.safetensors")
    ...     save_file(tuned, f"{folder}/tuned.safetensors")
    ...     made = surgery.extract(
    ...         f"{folder}/base.safetensors", f"{folder}/tuned.safetensors", f"{folder}/lora", rank=1
    ...     )
    >>> made.sites["0"].r, made.relative_error < 1e-5
    (1, True)
    """
    wanted = Extraction(Truncation(rank, energy), targets, rest, ops or {})
    with checkpoint(base) as before, checkpoint(tuned) as after:
        return extracting.extract(before, after, local_path(out), wanted, overwrite=overwrite)
