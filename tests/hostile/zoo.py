"""The zoo: every bad input by name, with the damage that makes it of a sound base and adapter, and what must follow."""

import sys
from pathlib import Path
from typing import NamedTuple

import damages
from damages import BASE_CONFIG, CONFIG, INDEX, LACKING, SHARD, SHARDS, TENSORS, Damage, Damages, in_json
from outsides import LINKS, SIZES
from poisons import CONFIGS, KEYS, NAMES, POISONS, RANKS, RIGHTLY_MERGED, shard_left_out_of_the_index

sys.path.insert(0, str(Path(__file__).parent.parent / "io"))

from bad_files import ZOO as BAD_FILES

SHARD_NAMES = {
    "of a file that is not there": "none.safetensors",
    "of another kind": "a.bin",
    "of a folder above": "..",
    "of the folder": ".",
    "empty": "",
    "with NUL": "a\0.safetensors",
    "with a newline": "a\n.safetensors",
    "with half a surrogate pair": "\ud800.safetensors",
    "of 300 characters": "a" * 300 + ".safetensors",
    "in a folder": "a/b.safetensors",
    "with a backslash": "a\\b.safetensors",
    "with a drive": "C:a.safetensors",
    "null": None,
    "a number": 5,
    "a list": [SHARDS[1]],
    "a table": {},
}
CONFIG_VALUES: dict[str, tuple[object, ...]] = {
    "peft_type": (LACKING, None, 5, ["LORA"], "lora", ""),
    "r": ("2", None, True, 0, -1, 2.0, [], 10**400),
    "lora_alpha": ("8", None, False, [], float("nan"), float("inf"), 10**400),
    "lora_dropout": ("0", -0.5, 10**400),
    "target_modules": (5, {}, [5], [""], [["0"]]),
    "modules_to_save": ("head", 5, [None]),
    "target_parameters": ("1.weight", 5, [5], [""]),
    "rank_pattern": (["0"], "0", {"0": "2"}, {"0": 0}, {"(": 2}),
    "alpha_pattern": ([4], {"0": None}, {"0": 10**400}, {"(": 2}),
    "use_rslora": ("false", 1, []),
    "fan_in_fan_out": ("false", 1, []),
    "init_lora_weights": (5, [], "PISSA"),
    "loftq_config": (5, [], {"loftq_bits": 3}, {"loftq_iter": 0}, {"loftq_iter": 10**400}, {"unheard": 1}),
    "eva_config": (
        5,
        [],
        {"rho": 0},
        {"rho": float("nan")},
        {"tau": "1"},
        {"unheard": 1},
        {"label_mask_value": 10**400},
    ),
    "corda_config": (5, [], {"corda_method": 1}, {"verbose": 1}, {"unheard": 1}),
    "lora_ga_config": (5, [], {"direction": []}, {"scale": None}, {"stable_gamma": 10**400}, {"unheard": 1}),
    "trainable_token_indices": ([1], {"0": [1]}, "1", [[1]], {"0": 5}, [10**400]),
    "bias": ("all", "some", 5, [], {}),
}


class Input(NamedTuple):
    """A damage, and the exit code that the merge ends with."""

    damage: Damage
    code: int


def _replaced(data: bytes) -> Damage:
    return lambda folder: (folder / SHARD).write_bytes(data)


INDICES: Damages = {
    **{f"a shard's name {what}": in_json(INDEX, "weight_map", "1.bias", value=name)
       for what, name in SHARD_NAMES.items()},
    **{f"weight_map {value}": in_json(INDEX, "weight_map", value=value) for value in (None, 5, [], {}, "a", LACKING)},
    **{f"metadata {value}": in_json(INDEX, "metadata", value=value) for value in (5, "abc", [1], True)},
    "a tensor said to be in another shard": in_json(INDEX, "weight_map", "1.bias", value=SHARDS[0]),
    "a tensor that no shard has": in_json(INDEX, "weight_map", "2\n.bias", value=SHARDS[0]),
    "a tensor left out of the index": in_json(INDEX, "weight_map", "1.bias", value=LACKING),
    "a shard's tensor that the index lacks": damages.one_tensor_not_in_the_index,
    "a tensor in two shards, told of the first": damages.one_tensor_twice,
    "a tensor in two shards, told of the second": damages.one_tensor_twice_told_of_the_second,
    "a shard outside": damages.one_shard_outside,
    "a shard at an absolute path": damages.one_shard_at_an_absolute_path,
    "a shard that the index leaves out": shard_left_out_of_the_index,
}  # fmt: skip
FILES: Damages = {
    **{name: damage for file in (INDEX, BASE_CONFIG, CONFIG) for name, damage in damages.no_json(file).items()},
    **{name: damage for file in (SHARD, TENSORS) for name, damage in damages.no_tensors(file).items()},
    **{name: damage for file in (INDEX, BASE_CONFIG, SHARD, CONFIG, TENSORS)
       for name, damage in damages.no_file(file).items()},
    **{name: damage for file in (INDEX, SHARD, CONFIG, TENSORS) for name, damage in damages.lacking(file).items()},
    "no base": damages.no_base,
    "an empty base": damages.an_empty_base,
    "no adapter": damages.no_adapter,
    "a base in a pickle": damages.a_base_in_a_pickle,
    "a base that is a pickle": damages.a_base_that_is_a_pickle,
    "an adapter in a pickle": damages.an_adapter_in_a_pickle,
}  # fmt: skip
VALUES: Damages = {
    f"{field} {str(value)[:30]}": in_json(CONFIG, field, value=value)
    for field, values in CONFIG_VALUES.items()
    for value in values
}
HEADERS: Damages = {f"a shard with {what}": _replaced(data) for what, data in BAD_FILES.items()}

REFUSED = (FILES, INDICES, VALUES, POISONS, RANKS, KEYS, NAMES, SIZES, LINKS, CONFIGS, HEADERS)
ZOO: dict[str, Input] = {
    **{name: Input(damage, 3) for table in REFUSED for name, damage in table.items()},
    **{name: Input(damage, 0) for name, damage in RIGHTLY_MERGED.items()},
}
assert len(ZOO) == sum(map(len, REFUSED)) + len(RIGHTLY_MERGED), "a name stands for two inputs"
