"""load_model: a model of transformers with its adapter, from the adapter alone; or a plain one.

What a config names chooses among the classes that transformers itself offers; nothing is imported by name, and
no code of a repository is run.
"""

import sys
from collections.abc import Collection, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from surgery.adapters.peft import CONFIG, read_adapter
from surgery.core.adapter import Adapter
from surgery.errors import AbsentError, EnvironmentFault, InputError, MatchError, UsageError, printable
from surgery.hosts.bitsandbytes_layers import never_round_scales
from surgery.integrations.transformers.quantizing import load_settings
from surgery.integrations.transformers.resizing import resize
from surgery.integrations.transformers.subclass import attach
from surgery.io.hub import Located, located
from surgery.io.strict_json import read_json
from surgery.procedures.live.load import lay

_TASKS: Mapping[str, str] = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
NAME_ONE = "let its config name a class of it"
_LABELLING = ("SEQ_CLS", "TOKEN_CLS")
_LABELS = ("classifier.weight", "score.weight", "out_proj.weight")  # a row for each label


class Wanted(NamedTuple):
    """How the base is to be loaded."""

    model_class: Any = None
    dtype: Any = "auto"
    device_map: Any = None
    quantization: Any = None


def load_model(
    where: str | PathLike[str], wanted: Wanted, revision: str | None, subfolder: str | None, trainable: bool
) -> nn.Module:
    """The base that the adapter at `where` names, with the adapter; or the model at `where`, if it holds no adapter."""
    place = located(where, revision, subfolder)
    if not (place.path / CONFIG).is_file():
        return base_model(place, wanted, None)
    adapter = read_adapter(place.path)
    model = base_model(_base_of(place, adapter), wanted, adapter)
    resize(model, adapter)
    lay(model, adapter, trainable=trainable)
    attach(model)
    return model


def _base_of(place: Located, adapter: Adapter) -> Located:
    """Where the base lies: beside the adapter, or where its config says."""
    if (place.path / "config.json").is_file():
        return place
    base = adapter.config.base_model_name_or_path
    if not base:
        raise InputError(
            f"{printable(place.path / CONFIG)}: base_model_name_or_path is empty; the name of a base is wanted; "
            "load the base with transformers, then surgery.load"
        )
    try:
        return located(base, adapter.config.revision)
    except InputError as error:
        raise type(error)(f"{printable(place.path / CONFIG)}: its base: {error}") from error


def base_model(place: Located, wanted: Wanted, adapter: Adapter | None) -> nn.Module:
    """The model at `place`, in the class of the adapter's task if there is one."""
    model, missing = read_model(place, wanted, adapter)
    if adapter is not None:
        _refuse_missing(missing, adapter, place, type(model))
    return model


def read_model(place: Located, wanted: Wanted, adapter: Adapter | None = None) -> tuple[nn.Module, Collection[str]]:
    """The model at a place, with as many labels as `adapter` brings; and the weights that it lacks: random ones."""
    transformers = transformers_package()
    if not (place.path / "config.json").is_file():
        raise AbsentError(f"{printable(place.path)}: no config.json in it; a model or an adapter folder is wanted")
    kind = _checked(wanted.model_class or class_of(transformers, place.path, adapter, "give model_class"))
    config = transformers.AutoConfig.from_pretrained(place.path, trust_remote_code=False)
    labels = None if adapter is None else _labels(adapter)
    if labels is not None and labels != config.num_labels:
        config.num_labels = labels
    model, told = kind.from_pretrained(
        place.path,
        config=config,
        dtype=wanted.dtype,
        device_map=wanted.device_map,
        trust_remote_code=False,
        use_safetensors=True,
        adapter_kwargs={"subfolder": "config.json"},  # where nothing can lie: else peft would load an adapter too
        output_loading_info=True,
        **load_settings(wanted.quantization, config, wanted.dtype),
    )
    for module in model.modules():
        never_round_scales(module)
    if place.hub_id is not None:
        model.name_or_path = model.config.name_or_path = place.hub_id
        model.config._commit_hash = place.commit  # where transformers keeps it of what it loads by an id
    return model, told["missing_keys"]


def _checked(kind: Any) -> Any:
    """UsageError for what is no class, such as the name of one."""
    if isinstance(kind, type):
        return kind
    raise UsageError(
        f"load_model: model_class is {printable(kind)!r}; the class itself is wanted, such as "
        "transformers.AutoModelForCausalLM"
    )


def class_of(transformers: Any, base: Path, adapter: Adapter | None, step: str = NAME_ONE) -> Any:
    """By the adapter's task, the class that it names, or the one that the base names.

    InputError with the next `step` for one that transformers has not.
    """
    if adapter is not None and adapter.config.task_type in _TASKS:
        return getattr(transformers, _TASKS[str(adapter.config.task_type)])
    if adapter is not None:
        where = Path(adapter.where)
        mapping = read_json((where if where.is_dir() else where.parent) / CONFIG).get("auto_mapping")
        named = mapping.get("base_model_class") if isinstance(mapping, dict) else None
        if named is not None:
            return _known_class(transformers, base, named, f"{printable(adapter.where)}: auto_mapping", step)
    told = read_json(base / "config.json").get("architectures")
    if isinstance(told, list) and told:
        return _known_class(transformers, base, told[0], f"{printable(base)}: architectures", step)
    return transformers.AutoModel


def _known_class(transformers: Any, base: Path, name: object, where: str, step: str) -> Any:
    """The model class of transformers that is so called: an exported one, or a part of the base's model."""
    if isinstance(name, str) and name.isidentifier():
        for place in (transformers, _modeling(transformers, base)):
            found = getattr(place, name, None)
            if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
                return found
    raise InputError(
        f"{where} names {printable(name)}, which is no model of transformers {transformers.__version__}; {step}"
    )


def _modeling(transformers: Any, base: Path) -> Any:
    """The module of transformers that has the base's kind of model; None where it knows none."""
    kind = read_json(base / "config.json").get("model_type")
    if not isinstance(kind, str) or kind not in transformers.CONFIG_MAPPING:
        return None
    model = transformers.MODEL_MAPPING.get(transformers.CONFIG_MAPPING[kind], None)
    return sys.modules[model.__module__] if isinstance(model, type) else None


def _labels(adapter: Adapter) -> int | None:
    """How many labels the head has that the adapter brings."""
    if adapter.config.task_type not in _LABELLING:
        return None
    return next((values.shape[0] for name, values in adapter.saved.items() if name.endswith(_LABELS)), None)


def _refuse_missing(missing: Any, adapter: Adapter, place: Located, kind: Any) -> None:
    """MatchError where what the adapter lies over would be random."""
    random = sorted({name for name in missing if name.rpartition(".")[0] in adapter.sites})
    if random:
        raise MatchError(
            f"{printable(place.path)}: it has no {printable(random[0])} for a {kind.__name__}, which the adapter "
            "lies over; another base or model_class is wanted"
        )


def transformers_package() -> Any:
    """EnvironmentFault if it is missing."""
    try:
        import transformers
    except ImportError as error:
        raise EnvironmentFault('transformers is missing; pip install "model-surgery[hf]"') from error
    return transformers
