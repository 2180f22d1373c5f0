"""More that can befall a base or an adapter: numbers, keys, names and fields that no merge can take."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from damages import BASE_CONFIG, CONFIG, INDEX, SHARD, SHARDS, TENSORS, Damage, Damages, in_json, write
from outsides import beside, both, deep, header, link_to, text_of
from safetensors.torch import load_file, save_file
from torch import Tensor

Tensors = dict[str, Tensor]
A, B = (f"base_model.model.1.lora_{role}.weight" for role in "AB")
FIRST = f"base/{SHARDS[0]}"
ESCAPES = {
    "a terminal escape": "\x1b[2J\x1b[31mred",
    "a bell": "\x07",
    "right to left": "\u202eevil",
    "NUL": "\0",
    "a newline": "a\nsurgery: all is well",
    "a carriage return": "a\rb",
    "a line separator": "\u2028",
    "a C1 control": "\x9b31m",
    "a tag character": "\U000e0041",
    "1000 characters": "n" * 1000,
}
NESTED = "(a+)+$"


def in_tensors(file: str, change: Callable[[Tensors], object]) -> Damage:
    """The file with other tensors."""

    def damage(folder: Path) -> None:
        tensors = load_file(folder / file)
        change(tensors)
        save_file({name: values.contiguous() for name, values in tensors.items()}, folder / file, {"format": "pt"})

    return damage


def element(file: str, name: str, value: float) -> Damage:
    def change(tensors: Tensors) -> None:
        tensors[name].view(-1)[1] = value

    return in_tensors(file, change)


def renamed(name: str, to: str) -> Damage:
    return in_tensors(TENSORS, lambda tensors: tensors.update({to: tensors.pop(name)}))


def config(**fields: Any) -> Damage:
    return both(*(in_json(CONFIG, name, value=value) for name, value in fields.items()))


def in_half(folder: Path) -> None:
    """The base in float16."""
    for shard in SHARDS:
        in_tensors(f"base/{shard}", lambda tensors: tensors.update({k: v.half() for k, v in tensors.items()}))(folder)


def all_prefixed(tensors: Tensors) -> None:
    for name in list(tensors):
        tensors[name.replace("base_model.model.", "base_model.model.x.y.")] = tensors.pop(name)
    tensors["base_model.model.q.lora_A.weight"] = torch.ones(2, 4)
    tensors["base_model.model.q.lora_B.weight"] = torch.ones(6, 2)


def named(name: str) -> Damage:
    """A pair for a module of this name, which the base lacks."""
    pair = {f"base_model.model.{name}.lora_A.weight": torch.ones(2, 4),
            f"base_model.model.{name}.lora_B.weight": torch.ones(6, 2)}  # fmt: skip
    return in_tensors(TENSORS, lambda tensors: tensors.update(pair))


def base_tensor(name: str) -> Damage:
    """A tensor of the base under a name that its index lacks."""
    return in_tensors(SHARD, lambda tensors: tensors.update({name: torch.zeros(1)}))


def shard_left_out_of_the_index(folder: Path) -> None:
    for name in ("1.weight", "1.bias"):
        in_json(INDEX, "weight_map", name, value=FIRST)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] = {name: shard for name, shard in index["weight_map"].items() if shard == SHARDS[0]}
    write(folder / INDEX, index)
    for name in (A, B):
        in_tensors(TENSORS, lambda tensors, name=name: tensors.pop(name))(folder)


def twice(key: str, value: str) -> Damage:
    """A key of the adapter's config once more."""

    def damage(folder: Path) -> None:
        text = (folder / CONFIG).read_text()
        (folder / CONFIG).write_text(text.rstrip()[:-1] + f', "{key}": {value}}}')

    return damage


POISONS: Damages = {
    "NaN in a merged base tensor": element(SHARD, "1.weight", torch.nan),
    "infinity in a merged base tensor": element(SHARD, "1.weight", torch.inf),
    **{f"{value} in {role}": element(TENSORS, role, value)
       for role in (A, B) for value in (torch.nan, torch.inf, -torch.inf)},
    "alpha 1e308": config(lora_alpha=1e308),
    "alpha -1e308": config(lora_alpha=-1e308),
    "alpha 1e42 in float32": config(lora_alpha=1e42),
    "an overflow in float16": both(in_half, config(lora_alpha=1e7)),
    "an overflow in float16 by alpha_pattern": both(in_half, config(alpha_pattern={"1": 1e7})),
    "alpha NaN": in_json(CONFIG, "lora_alpha", value=float("nan")),
    "alpha infinite, spelled 1e999": lambda folder: (folder / CONFIG).write_text(
        (folder / CONFIG).read_text().replace('"lora_alpha": 8', '"lora_alpha": 1e999')
    ),
}  # fmt: skip
RANKS: Damages = {
    "r is half of the tensors'": config(r=1),
    "r is twice the tensors'": config(r=4),
    "r = 2e9": config(r=2_000_000_000),
    "rank_pattern disagrees": config(rank_pattern={"1": 1}),
    "one site of another rank": in_tensors(TENSORS, lambda t: t.update({A: torch.ones(3, 6), B: torch.ones(3, 3)})),
    "A and B of different ranks": in_tensors(TENSORS, lambda t: t.update({A: torch.ones(3, 6)})),
    "A of three dimensions": in_tensors(TENSORS, lambda t: t.update({A: torch.ones(2, 6, 1)})),
    "A a scalar": in_tensors(TENSORS, lambda t: t.update({A: torch.tensor(1.0)})),
    "A without rows": in_tensors(TENSORS, lambda t: t.update({A: torch.ones(0, 6)})),
    "A of whole numbers": in_tensors(TENSORS, lambda t: t.update({A: torch.ones(2, 6, dtype=torch.int32)})),
    "A complex": in_tensors(TENSORS, lambda t: t.update({A: torch.ones(2, 6, dtype=torch.complex64)})),
    "A and B exchanged": in_tensors(TENSORS, lambda t: t.update({A: t[B], B: t[A]})),
    "A transposed": in_tensors(TENSORS, lambda t: t.update({A: t[A].T})),
    "base weight larger": in_tensors(SHARD, lambda t: t.update({"1.weight": torch.ones(3, 7)})),
    "base weight of three dimensions": in_tensors(SHARD, lambda t: t.update({"1.weight": torch.ones(3, 6, 1)})),
    "base weight of whole numbers": in_tensors(SHARD, lambda t: t.update({"1.weight": t["1.weight"].int()})),
    "base weight of float8": in_tensors(SHARD, lambda t: t.update({"1.weight": t["1.weight"].to(torch.float8_e5m2)})),
}
KEYS: Damages = {
    "one key renamed": renamed(A, A.replace("lora_A", "lora_C")),
    "one key without its prefix": renamed(A, A.removeprefix("base_model.")),
    "one key of another case": renamed(A, A.replace("lora_A", "Lora_A")),
    "one key with .default": renamed(A, A.replace("lora_A.weight", "lora_A.default.weight")),
    "one key with an end more": renamed(A, A + ".weight"),
    "one key without a module": renamed(A, "lora_A.weight"),
    "one key empty": renamed(A, ""),
    "one key removed": in_tensors(TENSORS, lambda tensors: tensors.pop(A)),
    "its partner removed": in_tensors(TENSORS, lambda tensors: tensors.pop(B)),
    "all keys with another prefix": in_tensors(TENSORS, all_prefixed),
    "no tensors": in_tensors(TENSORS, lambda tensors: tensors.clear()),
    "a tensor twice under two prefixes": in_tensors(
        TENSORS, lambda t: t.update({A.removeprefix("base_model.model."): t[A].clone()})
    ),
    "a pair for a module that the base lacks": named("2"),
    "a tensor of another method": in_tensors(
        TENSORS, lambda t: t.update({A.replace("lora_A", "hada_w1_a"): t[A].clone()})
    ),
    "a magnitude without use_dora": in_tensors(
        TENSORS, lambda t: t.update({"base_model.model.1.lora_magnitude_vector": torch.ones(3)})
    ),
    "a bias of LoRA": in_tensors(TENSORS, lambda t: t.update({"base_model.model.1.lora_B.bias": torch.ones(3)})),
    "a module to save of another shape": both(
        config(modules_to_save=["1"]),
        in_tensors(TENSORS, lambda t: t.update({"base_model.model.1.bias": torch.ones(4)})),
    ),
    "a copy of a base tensor, changed": in_tensors(
        TENSORS, lambda t: t.update({"base_model.model.1.base_layer.weight": torch.ones(3, 6)})
    ),
}
NAMES: Damages = {
    **{f"{what} in an adapter's key": named(f"1{text}") for what, text in ESCAPES.items()},
    **{f"{what} in a base tensor's name": base_tensor(text) for what, text in ESCAPES.items()},
    **{f"{what} in a shard's name": in_json(INDEX, "weight_map", "1.bias", value=f"{text}.safetensors")
       for what, text in ESCAPES.items()},
    **{f"{what} in a field's name": config(**{text: 1}) for what, text in ESCAPES.items()},
    **{f"{what} in a field's value": config(peft_type=text) for what, text in ESCAPES.items()},
    **{f"{what} in the metadata's name": header(TENSORS, {"__metadata__": {text: 1}})
       for what, text in ESCAPES.items()},
    "a link of an escaped name to nothing": beside("a\x1b[31m\n.txt", link_to("nothing")),
}  # fmt: skip
CONFIGS: Damages = {
    "lora_alpha twice": twice("lora_alpha", "800"),
    "r twice": twice("r", "2"),
    "peft_type twice": twice("peft_type", '"LORA"'),
    "target_modules twice": twice("target_modules", '["0"]'),
    "a key twice in rank_pattern": twice("rank_pattern_", "1, \"rank_pattern__\": {\"a\": 1, \"a\": 2}"),
    "an unknown field": config(never_heard_of=1),
    "use_dora": config(use_dora=True),
    "use_dora without magnitudes": config(use_dora=True),
    **{f"init_lora_weights {value}": config(init_lora_weights=value)
       for value in ("pissa", "pissa_niter_4", "olora", "loftq", "corda", "lora_ga", "mica")},
    "a bias that is trained": config(bias="lora_only"),
    "lora_bias": config(lora_bias=True),
    "use_qalora": config(use_qalora=True),
    "a megatron core to import": config(megatron_core="os"),
    "a megatron config": config(megatron_config={"a": 1}),
    "layer_replication": config(layer_replication=[[0, 1]]),
    "trainable tokens": config(trainable_token_indices=[1]),
    "target_parameters of other tensors": config(target_parameters=["0.weight", "0.bias"]),
    "alora": config(alora_invocation_tokens=[1]),
    "a rank_pattern that never ends": both(named(f"{'a' * 100}!"), config(rank_pattern={NESTED: 2})),
    "an alpha_pattern that never ends": both(named(f"{'a' * 100}!"), config(alpha_pattern={NESTED: 2})),
    "a rank_pattern that takes long to compile": config(rank_pattern={"(a{1000}){1000}": 2}),
    "an alpha_pattern of a million characters": config(alpha_pattern={"a" * 1_000_000: 2}),
    "target_modules that take long to compile": config(target_modules="((a{100}){100}){100}"),
    "target_modules of a million characters": config(target_modules="a" * 1_000_000),
    "target_modules of sets without case": config(target_modules="(?i)" + "[\x01-\uffff]" * 800),
    "exclude_modules that are no pattern": config(exclude_modules="("),
    "layers_pattern that is no pattern": config(layers_pattern="["),
    "layers_to_transform true": config(layers_to_transform=True),
    "layers_to_transform of strings": config(layers_to_transform=["0"]),
    **{f"peft_type {kind}": config(peft_type=kind) for kind in ("PROMPT_TUNING", "XLORA", "../LORA", "LORA\n")},
}  # fmt: skip
RIGHTLY_MERGED: Damages = {
    "a module to save that only the adapter brings": both(
        config(modules_to_save=["head"]),
        in_tensors(TENSORS, lambda t: t.update({"base_model.model.head.weight": torch.ones(3)})),
    ),
    "A of float8": in_tensors(TENSORS, lambda t: t.update({A: t[A].to(torch.float8_e4m3fn)})),
    "a base weight that is [in, out], as its shape tells": in_tensors(
        SHARD, lambda t: t.update({"1.weight": t["1.weight"].T})
    ),
    "alpha 0": config(lora_alpha=0),
    "alpha negative": config(lora_alpha=-8),
    "alpha_pattern 0": config(alpha_pattern={"1": 0}),
    "NaN in a base tensor that no adapter touches": element(SHARD, "1.bias", torch.nan),
    "infinity in a base tensor that no adapter touches": element(SHARD, "1.bias", torch.inf),
    "one layer's pair removed": in_tensors(TENSORS, lambda t: (t.pop(A), t.pop(B))),
    "target_modules narrowed to half": config(target_modules=["0"]),
    "target_modules a pattern that never ends": config(target_modules=NESTED),
    "target_modules null": config(target_modules=None),
    "exclude_modules a pattern that never ends": config(exclude_modules=NESTED),
    "layers_pattern that never ends": config(layers_pattern=NESTED),
    "auto_mapping of a module to import": config(auto_mapping={"parent_library": "os", "base_model_class": "system"}),
    "base_model_name_or_path that is a path": config(base_model_name_or_path="/etc/passwd"),
    "total_size that is wrong": in_json(INDEX, "metadata", "total_size", value=5),
    "a file of a name with an escape": beside("a\x1b[31m\n.txt", text_of(b"x")),
    "custom code": beside("modeling.py", text_of(b"raise SystemExit(9)")),
    "a pickle beside the weights": beside("pytorch_model.bin", text_of(b"cos\nsystem\n(S'exit 9'\ntR.")),
    "a tensor of a name with an escape": both(
        base_tensor("\x1b[31m\n\0"), in_json(INDEX, "weight_map", "\x1b[31m\n\0", value=SHARDS[1])
    ),
    "a link inside the folder": both(
        beside("there", Path.mkdir), lambda folder: (folder / SHARD).rename(folder / "base/there/x.safetensors"),
        beside(SHARDS[1], link_to("there/x.safetensors")),
    ),
    "64 nested lists in config.json": in_json(BASE_CONFIG, "x", value=json.loads(deep(60))["x"]),
    "nothing but an inner table named __metadata__": in_json(BASE_CONFIG, "__metadata__", value={"a": {}}),
}  # fmt: skip
