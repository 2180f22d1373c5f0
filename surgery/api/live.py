"""On a model in memory: each function calls one procedure, and attaches what transformers adds to its models."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from surgery.adapters.out_proj import check_scale
from surgery.adapters.peft import read_adapter
from surgery.api.awareness import held_as
from surgery.api.given import Where, calibrated
from surgery.errors import UsageError, printable
from surgery.hosts.within import trainable_within, within
from surgery.integrations import transformers as hugging
from surgery.io.hub import local_path, locate
from surgery.procedures.live import eject as ejection
from surgery.procedures.live import inject as injection
from surgery.procedures.live import load as loading
from surgery.procedures.live import merge as merging
from surgery.procedures.live import quantize as quantizing
from surgery.procedures.live import record_inputs as recording
from surgery.procedures.live import save as saving
from surgery.procedures.live.examples import Examples
from surgery.procedures.live.held_layers import Landing
from surgery.procedures.live.in_place import UndoKind
from surgery.procedures.places.configs import config_of, is_peft_s
from surgery.procedures.planning.treatment import Treatment

Model = TypeVar("Model", bound=nn.Module)


def inject(  # noqa: PLR0913  # what is laid over what, and how
    model: Model,
    config: object,
    *,
    adapter_name: str = "default",
    trainable: bool = True,
    matching: Literal["strict", "peft"] | None = None,
    quantization_aware: str | None = None,
    examples: Iterable[Any] | None = None,
    loss: Callable[[Any, Any], Tensor] | None = None,
) -> Model:
    """Lay a fresh adapter over the modules that `config` names, in place; returns the model.

    `config` is a config of surgery or peft, a dict of PEFT's fields, or the folder of an adapter. Where it names no
    `target_modules`, they are what PEFT takes for models of this type. The rest of the model is frozen. The first
    adapter is active.

    `matching` "strict" takes the dots of names as dots, globs such as "layers.*.q_proj", and regular expressions after
    "re:" in lists and keys of patterns; each entry has to match. "peft" matches as PEFT does, by default where the
    config is one of peft or lies in a file.

    With `quantization_aware` "nf4" or another format of `merge_checkpoint`, its layers run, and it is trained, as they
    will once it is merged and their weights are held so: the base's own scales are kept where it is held in that format
    already. With "keep" they will keep the codes that the layers are held in, or the files that the model was decoded
    from as it was loaded. A UserWarning tells where that is a merge of files alone, and `merge` holds no such layer.

    `examples` are for `init_lora_weights` "eva", "corda" and "lora_ga": batches, each a tensor, several in a list or
    tuple, or keyword arguments, which are run through the base; for "lora_ga" also back, from the loss that the model
    makes of each, or that `loss` makes of what the model gives and the batch. Raises MatchError for an entry that
    matches nothing, UsageError without the examples that it starts from, ConfigError, StateError.

    >>> import surgery, torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    >>> model = surgery.inject(model, surgery.LoraConfig(r=2, target_modules=["0"]))
    >>> [name for name, p in model.named_parameters() if p.requires_grad]
    ['0.lora_A.default.weight', '0.lora_B.default.weight']
    """
    if matching not in (None, "strict", "peft"):
        raise UsageError(f"matching is {printable(matching)!r}; strict or peft is wanted")
    as_peft = is_peft_s(config) if matching is None else matching == "peft"
    root = trainable_within(model) if trainable else within(model)
    heads = partial(hugging.output_heads, root)
    if loss is not None and examples is None:
        raise UsageError("loss is given, and no examples; leave it out, or give examples")
    batches = None if examples is None else Examples(examples, loss=loss)
    wanted = hugging.with_default_targets(root, config_of(config), as_peft)
    with held_as(quantization_aware, root) as held:
        injection.inject(root, wanted, adapter_name, injection.Start(heads, as_peft, held, batches), trainable)
    hugging.attach(root)
    return model


def load(  # noqa: PLR0913  # a model, an adapter, and how it is laid over it
    model: Model,
    path: Where,
    *,
    adapter_name: str = "default",
    trainable: bool = False,
    mha_out_proj_scale: int | None = None,
    quantization_aware: str | None = None,
) -> Model:
    """Lay a saved adapter over the model, in place; returns the model.

    `path` is a folder, a file, or owner/name[@revision] on the Hub. The first adapter is active, later ones
    are not. With `trainable` its tensors get gradients, and the rest of the model none. `mha_out_proj_scale` as in
    `merge_checkpoint`; what was chosen is a UserWarning where it matters. `quantization_aware` as in `inject`. Raises
    InputError unless every tensor of the adapter finds its place, StateError for a name that is taken.

    >>> import surgery, tempfile, torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    >>> model = surgery.inject(model, surgery.LoraConfig(r=2, target_modules=["0"]))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     surgery.save(model, folder)
    ...     model = surgery.load(model, folder, adapter_name="again")
    """
    adapter = read_adapter(locate(path), check_scale(mha_out_proj_scale))
    root = trainable_within(model) if trainable else within(model)
    with held_as(quantization_aware, root) as held:
        loading.lay(root, adapter, adapter_name, trainable, loading.LayOptions(held, hugging.room_of(root)))
    hugging.attach(root)
    return model


def save(model: nn.Module, folder: Where, *, adapter_name: str | None = None) -> None:
    """Write the model's adapters as PEFT does: "default" into `folder`, others into sub-folders of their name.

    `adapter_name` writes that one alone. Beside the tensors lies `surgery.base.json`, which tells which base they were
    trained on. Raises StateError without adapters or without that one, EnvironmentFault. `load` has an example.
    """
    saving.save(within(model), local_path(folder), None if adapter_name is None else [adapter_name])


def quantize(
    model: Model,
    kind: str,
    *,
    compute_dtype: torch.dtype | None = None,
    double_quant: bool = False,
    skip: Sequence[str] | None = None,
) -> Model:
    """Hold the weights of all nn.Linear as "nf4", "fp4" or "int8", in place, in bitsandbytes' own layers.

    `skip` names modules, with all in them, that are left as they are; by default the output heads.
    `compute_dtype` and `double_quant` are of 4 bits; by default each layer computes in the dtype that it has had.
    A model of transformers then saves itself as a quantized checkpoint. Raises MatchError for an entry that hits
    nothing and for tied weights, StateError where adapters are, EnvironmentFault without bitsandbytes.

    >>> import surgery, torch
    >>> model = surgery.quantize(torch.nn.Sequential(torch.nn.Linear(64, 64)), "nf4")
    >>> model = surgery.inject(model, surgery.LoraConfig(r=2, target_modules=["0"]))
    """
    wanted = quantizing.Quantization(kind, compute_dtype, double_quant)
    root = within(model)
    skipped = quantizing.quantize(root, wanted, skip, hugging.output_heads(root))
    hugging.tell_quantized(root, wanted, skipped)
    return model


def merge(  # noqa: PLR0913  # one argument an option
    model: Model,
    *,
    undo: UndoKind = "index",
    into: str | None = None,
    arithmetic: str = "exact",
    rounding: str | None = None,
    calibration: Where | None = None,
    min_retained: float | None = None,
    max_noise: float | None = None,
) -> Model:
    """Add the active adapters to the base weights, in place; `unmerge` takes them out again, to the bit.

    Returns the model. The bytes are those of `merge_checkpoint`.

    - `undo` "index" stores a fraction of a bit a parameter; "copy" keeps the original weights.
    - `into` is wanted over quantized weights. With "16bit" plain layers stand in for them until they are unmerged, with
      "keep" such as have the nearest codes by the same scales. "nf4", "fp4", "int8" or "fp8_block" hold adapted linear
      layers, plain ones too, by new scales, in the layers of bitsandbytes or transformers; others, and output heads,
      are merged as they are held.
    - `rounding`, `calibration`, `min_retained` and `max_noise` are as in `merge_checkpoint`.
    - `arithmetic` "peft" or "peft-safe" gives the bits that PEFT 0.21.2's merge, or safe merge, gives of the same
      parameters, and keeps the original weights.

    Raises StateError without adapters or while merged, InputError for what cannot be merged, CheckError where too
    little of the adapters would be left; the model then stays as it is.

    >>> import surgery, torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    >>> before = model[0].weight.clone()
    >>> config = surgery.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    >>> model = surgery.merge(surgery.inject(model, config))
    >>> bool((model[0].weight == before).all())
    False
    >>> model = surgery.unmerge(model)
    >>> bool((model[0].base_layer.weight == before).all())
    True
    """
    root, treatment = within(model), Treatment.of(into=into, arithmetic=arithmetic, rounding=rounding)
    with calibrated(treatment, calibration) as treatment:
        landing = Landing(treatment, treatment.bounds(min_retained, max_noise), hugging.output_heads(root))
        merging.merge(root, undo, landing)
    return model


def unmerge(model: Model) -> Model:
    """Bring the base weights back as they were before `merge`, to the bit; returns the model.

    Raises StateError if it is not merged, or if they have changed since. `merge` has an example.
    """
    merging.unmerge(within(model))
    return model


def eject(model: Model, *, keep_merged: bool = False) -> Model:
    """Put the model's own modules back, with their requires_grad flags; returns the model.

    It is unmerged first, unless `keep_merged`, by which what was merged stays. Raises StateError without adapters.

    >>> import surgery, torch
    >>> layer = torch.nn.Linear(4, 4)
    >>> model = surgery.inject(torch.nn.Sequential(layer), surgery.LoraConfig(r=2, target_modules=["0"]))
    >>> surgery.eject(model)[0] is layer
    True
    """
    root = within(model)
    ejection.eject(root, keep_merged)
    hugging.detach(root)
    if keep_merged:
        hugging.tell_ejected(root)
    return model


def record_inputs(  # noqa: PLR0913  # three things and their options
    model: nn.Module,
    batches: Iterable[Any],
    out: Where,
    *,
    targets: Sequence[str] | None = None,
    rank: int = 64,
    overwrite: bool = False,
) -> recording.Recording:
    """Run the model over `batches`, in eval mode, and write what its linear layers get to `out`, for `calibration`.

    A batch is what the model is called with: a tensor, several in a list or tuple, or keyword arguments, of which what
    attention_mask masks is left out. `targets` names the modules by the ends of their names, by default all. Of the
    second moment of a module's inputs, `rank` rows are kept and the mean squares of the rest, and memory holds no more
    than some such rows. Inputs are added up as they come: the same on another machine but for rounding, and it is the
    file that a merge tells.
    Raises MatchError, UsageError where no linear layer is called, ValueRangeError, OutputExistsError.

    >>> import surgery, tempfile, torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     surgery.record_inputs(model, [torch.randn(32, 8)], f"{folder}/inputs").counts
    {'0': 32}
    """
    ran = Examples(batches, "batches")
    return recording.record_inputs(within(model), ran, local_path(out), targets, rank, overwrite)
