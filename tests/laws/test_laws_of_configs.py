"""Every config: its JSON is itself again, and a field that we do not know is refused."""

import json
import math
import re
from contextlib import suppress
from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery.errors import ConfigError, FormatError
from surgery.methods import METHODS
from surgery.methods.bias_config import BiasConfig

laws = settings(deadline=None, max_examples=60, database=None)
each_config = pytest.mark.parametrize("name", METHODS)

names = st.text(min_size=1, max_size=12)
patterns = names.map(re.escape)
lists = st.lists(names, max_size=3)
tokens = st.lists(st.integers(0, 99), min_size=1, max_size=3, unique=True)
numbers = st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(10**6), 10**6)
SHARED = {
    "target_modules": st.none() | patterns | lists,
    "exclude_modules": st.none() | patterns | lists,
    "modules_to_save": st.none() | lists,
    "layers_to_transform": st.none() | st.integers(0, 40) | st.lists(st.integers(0, 40), max_size=3),
    "layers_pattern": st.none() | patterns | lists,
    "base_model_name_or_path": st.none() | names,
    "revision": st.none() | names,
    "task_type": st.sampled_from([None, "CAUSAL_LM", "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"]),
    "inference_mode": st.booleans(),
}
FROM_BASE = ("pissa", "pissa_niter_4", "olora", "loftq", "corda", "lora_ga")
LYCORIS: dict[str, st.SearchStrategy[Any]] = {
    "r": st.integers(1, 512),
    "alpha": numbers,
    "rank_dropout": st.floats(0, 1, exclude_max=True),
    "module_dropout": st.floats(0, 1, exclude_max=True),
    "use_effective_conv2d": st.booleans(),
    "rank_pattern": st.dictionaries(patterns, st.integers(1, 64), max_size=3),
    "alpha_pattern": st.dictionaries(patterns, numbers, max_size=3),
}
OWN: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "LORA": {
        "r": st.integers(1, 512),
        "lora_alpha": numbers,
        "lora_dropout": st.floats(0, 1, exclude_max=True),
        "use_rslora": st.booleans(),
        "use_dora": st.booleans(),
        "lora_bias": st.booleans(),
        "fan_in_fan_out": st.booleans(),
        "init_lora_weights": st.sampled_from([True, False, "gaussian", "orthogonal", "eva", *FROM_BASE]),
        "loftq_config": st.fixed_dictionaries({"loftq_bits": st.sampled_from([4, 8]), "loftq_iter": st.integers(1, 9)}),
        "eva_config": st.none() | st.fixed_dictionaries({"rho": st.floats(1, 9), "tau": st.floats(0, 1)}),
        "corda_config": st.none() | st.fixed_dictionaries({"corda_method": st.sampled_from(["ipm", "kpm"])}),
        "lora_ga_config": st.none() | st.fixed_dictionaries({"stable_gamma": st.integers(1, 99)}),
        "rank_pattern": st.dictionaries(patterns, st.integers(1, 64), max_size=3),
        "alpha_pattern": st.dictionaries(patterns, numbers, max_size=3),
        "bias": st.sampled_from(["none", "all", "lora_only"]),
        "target_parameters": st.none() | lists,
        "use_bdlora": st.none() | st.fixed_dictionaries({"nblocks": st.integers(1, 9)}),
        "use_qalora": st.booleans(),
        "qalora_group_size": st.integers(1, 64),
        "layer_replication": st.none() | st.lists(st.sampled_from([[0, 4], [2, 5]]), min_size=1, max_size=3),
        "ensure_weight_tying": st.booleans(),
        "trainable_token_indices": st.none() | tokens | st.dictionaries(names, tokens, min_size=1, max_size=3),
    },
    "ADALORA": {
        "r": st.integers(0, 512),
        "init_r": st.just(12),
        "target_r": st.integers(1, 12),
        "lora_alpha": st.floats(0.1, 1e6) | st.integers(1, 10**6),
        "lora_dropout": st.floats(0, 1, exclude_max=True),
        "fan_in_fan_out": st.booleans(),
        "init_lora_weights": st.booleans(),
        "bias": st.sampled_from(["none", "all", "lora_only"]),
        "tinit": st.integers(0, 99),
        "tfinal": st.integers(0, 99),
        "deltaT": st.integers(1, 99),
        "beta1": st.floats(0, 1, exclude_min=True, exclude_max=True),
        "beta2": st.floats(0, 1, exclude_min=True, exclude_max=True),
        "orth_reg_weight": st.floats(0, 10),
        "total_step": st.none() | st.integers(1, 999),
        "rank_pattern": st.none()
        | st.dictionaries(names, st.lists(st.booleans(), min_size=12, max_size=12), max_size=3),
    },
    "VERA": {
        "r": st.integers(1, 512),
        "projection_prng_key": st.integers(-(2**63), 2**64 - 1),
        "save_projection": st.booleans(),
        "vera_dropout": st.floats(0, 1, exclude_max=True),
        "d_initial": numbers,
        "fan_in_fan_out": st.booleans(),
        "bias": st.sampled_from(["none", "all", "vera_only"]),
        "init_weights": st.booleans(),
    },
    "RANDLORA": {
        "r": st.integers(1, 512),
        "projection_prng_key": st.integers(-(2**63), 2**64 - 1),
        "save_projection": st.booleans(),
        "sparse": st.booleans(),
        "very_sparse": st.booleans(),
        "randlora_dropout": st.floats(0, 1, exclude_max=True),
        "randlora_alpha": numbers,
        "fan_in_fan_out": st.booleans(),
        "bias": st.sampled_from(["none", "all", "randlora_only"]),
        "init_weights": st.booleans(),
    },
    "PVERA": {
        "r": st.integers(1, 512),
        "projection_prng_key": st.integers(-(2**63), 2**64 - 1),
        "save_projection": st.booleans(),
        "pvera_dropout": st.floats(0, 1, exclude_max=True),
        "d_initial": numbers,
        "fan_in_fan_out": st.booleans(),
        "bias": st.sampled_from(["none", "all", "pvera_only"]),
        "init_weights": st.booleans(),
        "generator_seed": st.none() | st.integers(0, 2**31),
    },
    "MISS": {
        "r": st.integers(1, 512),
        "miss_dropout": st.floats(0, 1, exclude_max=True),
        "mini_r": st.integers(1, 64),
        "init_weights": st.sampled_from([True, False, "mini"]),
        "bias": st.sampled_from(["none", "all", "MiSS_only"]),
    },
    "DELORA": {
        "r": st.integers(1, 512),
        "delora_lambda": numbers,
        "module_dropout": st.floats(0, 1, exclude_max=True),
        "bias": st.sampled_from(["none", "all", "delora_only"]),
        "init_weights": st.booleans(),
        "rank_pattern": st.none() | st.dictionaries(patterns, st.integers(1, 64), max_size=3),
        "lambda_pattern": st.none() | st.dictionaries(patterns, numbers, max_size=3),
    },
    "GRALORA": {
        "r": st.integers(1, 64).map(lambda part: 12 * part),
        "hybrid_r": st.integers(0, 512),
        "alpha": numbers,
        "gralora_dropout": st.floats(0, 1, exclude_max=True),
        "gralora_k": st.sampled_from([1, 2, 4]),
        "fan_in_fan_out": st.booleans(),
        "bias": st.sampled_from(["none", "all", "gralora_only"]),
        "init_weights": st.booleans(),
    },
    "GLORA": {
        "r": st.integers(1, 512),
        "bias": st.sampled_from(["none", "all", "glora_only"]),
        "config_A_B": st.sampled_from(["lora", "vector", "constant", "none"]),
        "config_C": st.sampled_from(["lora", "vector", "none"]),
        "config_D_E": st.sampled_from(["vector", "constant", "none"]),
        "init_weights": st.booleans(),
    },
    "HIRA": {
        "r": st.integers(1, 512),
        "hira_dropout": st.floats(0, 1, exclude_max=True),
        "fan_in_fan_out": st.booleans(),
        "init_weights": st.sampled_from([True, False, None, "gaussian"]),
        "rank_pattern": st.none() | st.dictionaries(patterns, st.integers(1, 64), max_size=3),
    },
    "SHIRA": {
        "r": st.integers(1, 512),
        "mask_type": st.sampled_from(["random", "mine"]),
        "random_seed": st.none() | st.integers(0, 99),
        "fan_in_fan_out": st.booleans(),
        "init_weights": st.booleans(),
    },
    "VBLORA": {
        "r": st.integers(1, 512),
        "num_vectors": st.integers(64, 1 << 20),
        "vector_length": st.integers(1, 1 << 20),
        "topk": st.integers(1, 64),
        "save_only_topk_weights": st.booleans(),
        "vblora_dropout": st.floats(0, 1, exclude_max=True),
        "fan_in_fan_out": st.booleans(),
        "bias": st.sampled_from(["none", "all", "vblora_only"]),
        "init_vector_bank_bound": st.floats(0, 2),
        "init_logits_std": st.floats(0, 2),
    },
    "UNILORA": {
        "r": st.integers(1, 512),
        "proj_seed": st.integers(0, 2**64 - 1),
        "theta_d_length": st.integers(1, 1 << 20),
        "unilora_dropout": st.floats(0, 1, exclude_max=True),
        "fan_in_fan_out": st.booleans(),
        "bias": st.sampled_from(["none", "all", "unilora_only"]),
        "init_theta_d_bound": st.floats(0, 2, exclude_min=True),
        "init_weights": st.booleans(),
        "save_indices": st.booleans(),
    },
    "TINYLORA": {
        "r": st.integers(1, 512),
        "u": st.integers(1, 512),
        "weight_tying": st.floats(0, 1),
        "projection_seed": st.integers(0, 2**63 - 1),
        "save_projection": st.booleans(),
        "init_v_bound": st.floats(0, 2),
        "tinylora_dropout": st.floats(0, 1, exclude_max=True),
        "fan_in_fan_out": st.booleans(),
        "bias": st.sampled_from(["none", "all", "tinylora_only"]),
        "init_weights": st.sampled_from([True, False, "uniform"]),
    },
    "SUPERTUNING": {
        "sparsity": st.floats(0, 1, exclude_max=True),
        "select_top": st.booleans(),
        "save_precomputed_indices": st.just(True),
        "r": st.integers(1, 512),
        "lora_alpha": numbers,
        "lora_dropout": st.floats(0, 1, exclude_max=True),
        "init_weights": st.booleans(),
    },
    "C3A": {
        "block_size": st.integers(1, 512),
        "block_size_pattern": st.dictionaries(patterns, st.integers(1, 64), max_size=3),
        "init_weights": st.sampled_from([True, False, "gaussian", "kaiming_uniform", "xavier_uniform"]),
        "bias": st.sampled_from(["none", "all", "c3a_only"]),
    },
    "FOURIERFT": {
        "n_frequency": st.integers(1, 512),
        "scaling": numbers,
        "random_loc_seed": st.integers(0, 99),
        "fan_in_fan_out": st.booleans(),
        "bias": st.sampled_from(["none", "all", "fourier_only"]),
        "n_frequency_pattern": st.dictionaries(patterns, st.integers(1, 64), max_size=3),
        "init_weights": st.booleans(),
    },
    "WAVEFT": {
        "n_frequency": st.integers(1, 512),
        "scaling": numbers,
        "wavelet_family": st.sampled_from(["db1", "db3", "sym2", "coif1"]),
        "use_idwt": st.booleans(),
        "random_loc_seed": st.integers(0, 99),
        "fan_in_fan_out": st.booleans(),
        "bias": st.sampled_from(["none", "all", "waveft_only"]),
        "n_frequency_pattern": st.dictionaries(patterns, st.integers(1, 64), max_size=3),
        "init_weights": st.booleans(),
    },
    "IA3": {
        "feedforward_modules": st.none() | patterns | lists,
        "fan_in_fan_out": st.booleans(),
        "init_ia3_weights": st.booleans(),
    },
    "LOHA": {**LYCORIS, "init_weights": st.booleans()},
    "HRA": {
        "r": st.integers(1, 512),
        "apply_GS": st.booleans(),
        "bias": st.sampled_from(["none", "all", "hra_only"]),
        "init_weights": st.booleans(),
    },
    "OFT": {
        "r": st.just(0),
        "oft_block_size": st.integers(1, 512),
        "module_dropout": st.floats(0, 1, exclude_max=True),
        "fan_in_fan_out": st.booleans(),
        "bias": st.sampled_from(["none", "all", "oft_only"]),
        "init_weights": st.booleans(),
        "coft": st.booleans(),
        "eps": st.floats(0, 9),
        "block_share": st.booleans(),
        "use_cayley_neumann": st.booleans(),
        "num_cayley_neumann_terms": st.integers(1, 9),
    },
    "BOFT": {
        "boft_block_size": st.integers(1, 512),
        "boft_block_num": st.just(0),
        "boft_n_butterfly_factor": st.integers(1, 9),
        "boft_dropout": st.floats(0, 1, exclude_max=True),
        "fan_in_fan_out": st.booleans(),
        "bias": st.sampled_from(["none", "all", "boft_only"]),
        "init_weights": st.just(True),
    },
    "ROAD": {
        "variant": st.sampled_from(["road_1", "road_2", "road_4"]),
        "group_size": st.integers(1, 99).map(lambda pairs: 2 * pairs),
        "init_weights": st.booleans(),
    },
    "BEFT": {"init_weights": st.booleans()},
    "TRAINABLE_TOKENS": {"token_indices": st.just([]) | tokens, "init_weights": st.booleans()},
    "LOKR": {
        **LYCORIS,
        "decompose_both": st.booleans(),
        "decompose_factor": st.integers(-1, 64),
        "rank_dropout_scale": st.booleans(),
        "init_weights": st.sampled_from([True, False, "lycoris"]),
    },
}


@each_config
@laws
@given(data=st.data())
def test_a_config_read_from_its_json_is_equal(name: str, data: st.DataObject):
    config = METHODS[name]
    chosen = data.draw(st.fixed_dictionaries({}, optional={**SHARED, **OWN.get(name, {})}))
    if chosen.get("use_bdlora"):
        chosen.pop("use_qalora", None)
    if chosen.get("layer_replication"):
        chosen.pop("bias", None)
    if name == "SUPERTUNING" and "r" not in chosen:
        chosen.pop("lora_alpha", None)
    if chosen.get("use_bdlora") or chosen.get("use_qalora"):
        others = ("use_dora", "lora_bias", "target_parameters", "init_lora_weights")
        chosen = {field: value for field, value in chosen.items() if field not in others}
    if chosen.get("lora_bias"):  # which excludes some others
        chosen = {field: value for field, value in chosen.items() if field not in ("use_dora", "init_lora_weights")}
    if chosen.get("init_lora_weights") in FROM_BASE:
        others = ("use_dora", "target_parameters", "trainable_token_indices")
        chosen = {field: value for field, value in chosen.items() if field not in others}
    if chosen.get("target_parameters"):
        others = ("use_dora", "lora_bias", "lora_dropout", "bias", "init_lora_weights")
        chosen = {field: value for field, value in chosen.items() if field not in others}
    written = config(**chosen)
    read = config.from_json(json.loads(json.dumps(written.to_json())))
    assert read == written
    assert read.to_json() == written.to_json()
    assert all(getattr(written, field) == value for field, value in chosen.items())


@each_config
def test_every_field_of_a_config_is_drawn(name: str):
    assert {field.name for field in fields(METHODS[name])} == set(SHARED) | set(OWN.get(name, {}))


@each_config
def test_equal_configs_give_equal_bytes_in_order_of_their_names(name: str):
    spellings = [["b", "a"], ("b", "a")], [{"a", "b"}, frozenset({"b", "a"})]
    for first, second in spellings:
        left, right = (METHODS[name](target_modules=value).to_json() for value in (first, second))
        assert json.dumps(left) == json.dumps(right)
        assert list(left) == sorted(left)
        assert left["peft_type"] == name


@each_config
@pytest.mark.parametrize("value", [None, False, 0, 1, "x", [], {}], ids=repr)
def test_an_unknown_field_is_refused_whatever_its_value(name: str, value: object):
    config = METHODS[name]
    with pytest.raises(FormatError, match="no_such_field"):
        config.from_json({**config().to_json(), "no_such_field": value}, "here.json")


@each_config
def test_a_misspelt_field_is_refused_with_the_one_that_is_near(name: str):
    config = METHODS[name]
    for field in config.own() - {"r"}:
        with pytest.raises(FormatError, match=rf"unknown field '{field}z'; .*; is {field} meant\?"):
            config.from_json({**config().to_json(), f"{field}z": 1}, "here.json")


@each_config
def test_a_field_that_changes_the_maths_is_refused_unless_it_is_neutral(name: str):
    config = METHODS[name]
    plain = config().to_json()
    for field, value in config.neutral.items():
        assert config.from_json({**plain, field: value}) == config()
        with pytest.raises(FormatError, match=field):
            config.from_json({**plain, field: "anything else"}, "here.json")


@each_config
def test_which_biases_are_trained_is_told_by_bias_which_takes_no_word_of_another_method(name: str):
    config = METHODS[name]
    if "bias" not in {field.name for field in fields(config)}:
        assert config().biases() == "none"
        return
    assert issubclass(config, BiasConfig)
    for value in ("none", "all", config.bias_of_adapted):
        assert config(bias=value).biases() == value
    for value in ("another_only", "None", "", None, True):
        with pytest.raises(ConfigError, match=f"'none', 'all' or '{config.bias_of_adapted}' is wanted"):
            config(bias=value)


@each_config
def test_where_a_file_came_from_changes_nothing(name: str):
    config = METHODS[name]
    origin = {"auto_mapping": {"x": 1}, "peft_version": "9.9", "runtime_config": {"y": 2}}
    assert config.from_json({**config().to_json(), **origin}) == config()
    assert config.from_json({}) == config()


@each_config
@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "modules_to_save"])
@pytest.mark.parametrize("value", [3, {"a": 1}, [1], [""], ["a", None]], ids=repr)
def test_names_of_modules_that_are_no_names_are_refused(name: str, field: str, value: object):
    with pytest.raises((ConfigError, FormatError), match=field):
        METHODS[name].from_json({field: value})


@each_config
def test_a_field_of_any_type_is_read_or_refused_by_our_own_errors(name: str):
    config = METHODS[name]
    for field in config().to_json():
        for value in (None, True, -1, 1.5, float("inf"), "x", [], [[]], {}, {"x": "y"}, {"x": -1}):
            with suppress(ConfigError, FormatError):
                config.from_json({**config().to_json(), field: value})


@pytest.mark.parametrize("r", [1, 4, 7])
def test_loras_scaling_is_alpha_over_the_rank_or_over_its_root(r: int):
    assert METHODS["LORA"](r=r, lora_alpha=3).method("layer").scaling == 3 / r
    assert METHODS["LORA"](r=r, lora_alpha=3, use_rslora=True).method("layer").scaling == 3 / math.sqrt(r)
