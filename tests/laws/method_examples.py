"""Every method over every op, as cases of the laws; trained tensors, bases and inputs for them."""

from collections.abc import Callable, Mapping
from itertools import combinations
from typing import Any

import pytest
import torch
from op_examples import EXAMPLES, GROUPED, IN, OUT, shape_given, site_of
from torch import Tensor

from surgery.core.arithmetic import exact_product
from surgery.core.method import Dense, Method, Params
from surgery.core.op import WHOLE, Op
from surgery.core.spec import Spec
from surgery.core.sums import sum_rows
from surgery.methods import METHODS

EPS = torch.finfo(torch.float64).eps


# By method, the settings to hold the laws for besides its defaults; each leaves a fresh adapter without effect.
VARIANTS: Mapping[str, list[dict[str, Any]]] = {
    "LORA": [
        {"r": 3, "lora_alpha": 5, "use_rslora": True},
        {"r": 1, "lora_alpha": -7.5, "lora_dropout": 0.5},
        {"r": 4, "init_lora_weights": "gaussian"},
        {"r": 2, "rank_pattern": {"layer": 5}, "alpha_pattern": {"layer": 0.3}},
        {"r": 3, "lora_alpha": 5, "use_dora": True},
        {"r": 2, "lora_alpha": -3, "use_dora": True, "init_lora_weights": "gaussian", "use_rslora": True},
        {"r": 3, "lora_alpha": 5, "lora_bias": True},
        {"r": 3, "lora_alpha": 5, "use_qalora": True, "qalora_group_size": 5},
        {"r": 3, "lora_alpha": 5, "init_lora_weights": "pissa"},
        {"r": 2, "use_rslora": True, "init_lora_weights": "olora"},
    ],
    "IA3": [{"feedforward_modules": ["layer"]}],
    "ADALORA": [
        {"lora_alpha": 3, "lora_dropout": 0.5},
        {"init_r": 3, "rank_pattern": {"layer.lora_E": [True, False, True]}},
    ],
    "VERA": [{"r": 3, "vera_dropout": 0.5, "d_initial": -2}],
    "LOHA": [
        {"r": 3, "alpha": 5, "use_effective_conv2d": True},
        {"r": 2, "alpha": -1.5, "rank_pattern": {"layer": 5}, "alpha_pattern": {"layer": 0.3}, "rank_dropout": 0.2},
    ],
    "HRA": [{"r": 2}, {"r": 6}],
    "OFT": [
        {"r": 3, "oft_block_size": 0, "module_dropout": 0.5, "num_cayley_neumann_terms": 7},
        {"oft_block_size": 2, "block_share": True, "num_cayley_neumann_terms": 2},
        {"oft_block_size": 32, "use_cayley_neumann": False},
        {"oft_block_size": 4, "coft": True, "eps": 0.7},
        {"oft_block_size": 5, "coft": True, "eps": 0.7, "use_cayley_neumann": False, "block_share": True},
    ],
    "BOFT": [
        {"boft_block_size": 0, "boft_block_num": 2, "boft_dropout": 0.5},
        {"boft_block_size": 10},
    ],
    "ROAD": [{"variant": "road_2", "group_size": 6}, {"variant": "road_4", "group_size": 4}],
    "PVERA": [{"r": 3, "pvera_dropout": 0.5}],
    "MISS": [{"r": 5, "miss_dropout": 0.5}, {"init_weights": "mini", "mini_r": 4}],
    "DELORA": [{"r": 3, "delora_lambda": -0.5}, {"lambda_pattern": {"layer": 4}, "module_dropout": 0.5}],
    "GRALORA": [
        {"r": 4, "hybrid_r": 3, "alpha": -3, "gralora_dropout": 0.5},
        {"r": 6, "gralora_k": 1, "alpha": 5},
    ],
    "GLORA": [
        {"config_A_B": "vector", "config_C": "vector", "config_D_E": "vector"},
        {"config_A_B": "constant", "config_C": "none", "config_D_E": "none"},
        {"config_A_B": "none", "r": 3},
    ],
    "HIRA": [{"r": 2, "init_weights": "gaussian"}, {"rank_pattern": {"layer": 5}, "hira_dropout": 0.5}],
    "LOKR": [
        {"r": 1, "alpha": 5, "use_effective_conv2d": True},
        {"r": 1, "alpha": -0.3, "decompose_both": True, "decompose_factor": 4, "init_weights": "lycoris"},
        {"r": 2, "decompose_factor": 1, "rank_dropout": 0.2, "rank_dropout_scale": True},
    ],
    "RANDLORA": [{"r": 3, "randlora_dropout": 0.5, "randlora_alpha": -7}, {"r": 12, "randlora_alpha": 3}],
    "UNILORA": [{"r": 3, "save_indices": True, "unilora_dropout": 0.5}, {"theta_d_length": 5, "proj_seed": 7}],
    "TINYLORA": [{"r": 4, "u": 3, "tinylora_dropout": 0.5}, {"save_projection": False, "projection_seed": 7}],
    "SHIRA": [{"r": 5, "random_seed": 3}],
    "VBLORA": [
        {"r": 3, "topk": 4, "vector_length": 1},
        {"topk": 3, "save_only_topk_weights": True, "vblora_dropout": 0.5},
    ],
    "SUPERTUNING": [
        {"r": 3, "lora_alpha": -5, "lora_dropout": 0.5},
        {"r": 3},
        {"select_top": False, "sparsity": 0.3},
    ],
    "C3A": [{"block_size": 1}, {"block_size": 5, "block_size_pattern": {"layer": 2}}],
    "WAVEFT": [
        {"wavelet_family": "coif1", "scaling": -3},
        {"n_frequency": 120, "wavelet_family": "db2"},
        {"random_loc_seed": 5},
        {"wavelet_family": "db2"},
        {"n_frequency_pattern": {"layer": 17}, "use_idwt": False, "random_loc_seed": 5},
    ],
    "FOURIERFT": [
        {"n_frequency": 120, "scaling": -3},
        {"n_frequency_pattern": {"layer": 7}, "random_loc_seed": 5},
        {"random_loc_seed": 5},
    ],
}


# Settings that have no default, or whose default is no whole scaling.
NEEDED: Mapping[str, dict[str, Any]] = {
    "IA3": {"feedforward_modules": []},
    "ADALORA": {"init_r": 4, "lora_alpha": 4 + 1e-5},
    "VERA": {"r": 4},
    "OFT": {"oft_block_size": 4},
    "BOFT": {"boft_block_size": 2},
    "ROAD": {"group_size": 12},
    "TRAINABLE_TOKENS": {"token_indices": [7, 0, 3]},
    "PVERA": {"r": 4},
    "MISS": {"r": 4},  # of which IN is no multiple
    "RANDLORA": {"r": 4, "randlora_alpha": 8},
    "SHIRA": {"r": 2},
    "SUPERTUNING": {"sparsity": 0.75},
    "C3A": {"block_size": 2, "init_weights": True},
    "FOURIERFT": {"n_frequency": 30, "init_weights": True},
    "WAVEFT": {"n_frequency": 30},
    "HRA": {"r": 4},
    "UNILORA": {"r": 4, "theta_d_length": 40},
    "VBLORA": {"r": 4, "num_vectors": 7, "vector_length": 2},
}


ALLOTTED = {"linear", "conv1d", "convolution of one place", "convolution over two axes"}  # what AdaLoRA acts on


MATRICES = {"linear", "conv1d"}  # what methods with projections act on


OF_LYCORIS = {"linear", GROUPED, *(name for name in EXAMPLES if name.startswith("convolution") and "three" not in name)}


HAS_ROWS = {"linear", "embedding", "scaled embedding"}  # one for each token


UNFIT = {  # which refuse each other, and what is said of it; the last where it would be merged
    ("IA3", "embedding"): "an embedding",
    ("IA3", "scaled embedding"): "an embedding",
    ("IA3", "convolution over one axis"): "a Conv1d",
    ("IA3", "attention"): "an attention",
    **{("TRAINABLE_TOKENS", name): "of Embedding and Linear" for name in EXAMPLES if not HAS_ROWS & {name}},
    **{("DELORA", name): "DeLoRA acts on" for name in EXAMPLES if name != "linear"},
    **{("GRALORA", name): "GraLoRA acts on" for name in EXAMPLES if name not in {"linear", "conv1d"}},
    **{("GLORA", name): "GLoRA acts on Linear" for name in EXAMPLES if name != "linear"},
    ("HIRA", "attention"): "an attention",
    ("HIRA", GROUPED): "in 2 groups",
    **{("ADALORA", name): "AdaLoRA acts on" for name in EXAMPLES if name not in ALLOTTED},
    **{(method, name): "VeRA acts on" for method in ("VERA", "PVERA") for name in EXAMPLES if name not in MATRICES},
    **{("MISS", name): "MiSS acts on Linear" for name in EXAMPLES if name != "linear"},
    **{("RANDLORA", name): "RandLoRA acts on" for name in EXAMPLES if name not in MATRICES},
    **{("VBLORA", name): "VB-LoRA acts on" for name in EXAMPLES if name not in MATRICES},
    **{("UNILORA", name): "Uni-LoRA acts on" for name in EXAMPLES if name not in MATRICES},
    **{("TINYLORA", name): "TinyLoRA acts on" for name in EXAMPLES if not {name} & (MATRICES | HAS_ROWS)},
    **{("SHIRA", name): "SHiRA acts on Linear" for name in EXAMPLES if name != "linear"},
    **{("SUPERTUNING", name): "Super-Tuning acts on Linear" for name in EXAMPLES if name != "linear"},
    **{("C3A", name): "C3A acts on Linear" for name in EXAMPLES if name != "linear"},
    **{("FOURIERFT", name): "FourierFT acts on" for name in EXAMPLES if name not in MATRICES},
    **{("WAVEFT", name): "WaveFT acts on" for name in EXAMPLES if name not in MATRICES},
    **{("BEFT", name): "BEFT acts on" for name in EXAMPLES if name != "linear"},
    ("LORA", GROUPED): "in groups",
    **{("LOHA", name): "LoHa acts on" for name in EXAMPLES if name not in OF_LYCORIS},
    ("OFT", "conv1d"): "its op is conv1d",
    ("OFT", "attention"): "its op is attention",
    ("OFT", "convolution over one axis"): "a Conv1d",
    ("OFT", "convolution over two axes"): "PEFT's OFT changes the outputs before anything is trained",
    ("OFT", "convolution over three axes"): "a Conv3d",
    ("OFT", GROUPED): r"a convolution over \[2, 1\]",
    ("BOFT", "conv1d"): "its op is conv1d",
    ("BOFT", "attention"): "its op is attention",
    ("BOFT", "embedding"): "its op is embedding",
    ("BOFT", "scaled embedding"): "its op is embedding",
    ("BOFT", "convolution over one axis"): "a Conv1d;",
    ("BOFT", "convolution over three axes"): "a Conv3d;",
    ("BOFT", GROUPED): "a Conv2d in 2 groups",
    **{("ROAD", name): "RoAd acts on Linear" for name in EXAMPLES if name != "linear"},
    **{("LOKR", name): "LoKr acts on" for name in EXAMPLES if name not in OF_LYCORIS},
    ("HRA", "conv1d"): "its op is conv1d",
    ("HRA", "attention"): "its op is attention",
    ("HRA", "embedding"): "its op is embedding",
    ("HRA", "scaled embedding"): "its op is embedding",
    ("HRA", "convolution over one axis"): r"a convolution over \[5\]",
    ("HRA", "convolution over two axes"): r"a convolution over \[1, 2\]",
    ("HRA", "convolution over three axes"): r"a convolution over \[2, 1, 1\]",
    ("HRA", GROUPED): r"a convolution over \[2, 1\], in 2 groups",
}


# Which make fractions or roots of whole numbers.
UNEVEN = {"DELORA", "C3A", "HRA", "BOFT", "ROAD", "VBLORA", "FOURIERFT"}


ONLY = {  # settings that are refused over other ops
    "lora_dropout": {"linear", "conv1d", "embedding", "convolution"},
    "use_dora": {"linear", "conv1d", "embedding", "convolution"},
    "lora_bias": {"linear", "conv1d", "convolution"},
    "use_qalora": {"linear"},
}


def made(name: str, **settings: Any) -> Method:
    return METHODS[name](**NEEDED.get(name, {}) | settings).method("layer")


AT_SITES = [name for name, config in METHODS.items() if not config.copied]  # those that copy modules compute nothing


CASES = [
    pytest.param(made(name, **settings), op, id=f"{name}-{index}-{example}")
    for name in AT_SITES
    for index, settings in enumerate([{}, *VARIANTS.get(name, [])])
    for example, op in EXAMPLES.items()
    if (name, example) not in UNFIT and not any(op.name not in ops and key in settings for key, ops in ONLY.items())
]


each_case = pytest.mark.parametrize(("method", "op"), CASES)


ACTING = {"VB-LoRA", "Uni-LoRA"}  # which change the outputs before anything is trained, as in PEFT


each_idle = pytest.mark.parametrize(("method", "op"), [one for one in CASES if one.values[0].name not in ACTING])


each_mixing, each_with_steps = (
    pytest.mark.parametrize(("method", "op"), [one for one in CASES if one.values[0].mixes == mixes])
    for mixes in (True, False)
)


# Those that treat each element by itself, or by sums; what replaces rows says nothing of what stood there.
each_step = pytest.mark.parametrize(
    ("method", "op"), [one for one in CASES if not one.values[0].mixes and not one.values[0].replaced_rows]
)


each_lasting = pytest.mark.parametrize(("method", "op"), [one for one in CASES if not one.values[0].replaced_rows])


# Two of a kind, over one op, whose tensors have the same names and shapes.
each_twins = pytest.mark.parametrize(
    ("method", "twin", "op"),
    [
        pytest.param(one.values[0], other.values[0], one.values[1], id=f"{one.id}-{other.id}")
        for one, other in combinations(CASES, 2)
        if type(one.values[0]) is type(other.values[0])
        and one.values[1] is other.values[1]
        and one.values[0].tensors(site_of(one.values[1])) == other.values[0].tensors(site_of(one.values[1]))
    ],
)


each_op = pytest.mark.parametrize("op", [op for op in EXAMPLES.values() if op.groups == 1], ids=lambda op: op.name)


each_pair = pytest.mark.parametrize(("name", "example"), [(n, e) for n in AT_SITES for e in EXAMPLES], ids=str)


def trained(method: Method, op: Op, dtype: torch.dtype = torch.float64) -> Params:
    """Every tensor of the method filled with normal numbers, as training would leave it; one of indices as it began."""
    fresh, specs = begun(method, op, Dense(torch.ones(OUT, IN))), method.tensors(site_of(op))
    moved = of_floats(fresh, lambda values: torch.randn(values.shape, dtype=dtype))
    # Fixed zeros stand for what is not there.
    stays = {role for role, spec in specs.items() if spec.fixed and not bool(fresh[role].any())}
    return moved | {role: fresh[role].to(dtype) for role in stays if fresh[role].is_floating_point()}


def of_floats(p: Params, become: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """`p`, and what becomes of its tensors, but for those of indices."""
    return {role: become(values) if values.is_floating_point() else values for role, values in p.items()}


def begun(method: Method, op: Op, base: Dense) -> Params:
    """A fresh adapter with what its sites share, which is drawn for all of them, or begins as zeros to be trained."""
    shared = {role: spec for role, spec in method.tensors(site_of(op)).items() if spec.shared}
    drawn = {
        role: torch.randn(spec.shape) if spec.fixed or method.name in ACTING else torch.zeros(spec.shape)
        for role, spec in shared.items()
    }
    return {**method.init(site_of(op), lambda: base), **drawn}


def given(op: Op, dtype: torch.dtype, *batch: int) -> Tensor:
    """An input [*batch, in]; an embedding's is one index in place of `in` numbers."""
    shape = shape_given(op, *batch)
    return torch.randint(0, IN, shape) if op.name == "embedding" else torch.randn(*shape, dtype=dtype)


def matrices(method: Method, op: Op, p: Params) -> Params:
    """As its merge takes them."""
    return method.matrices(p, site_of(op))


def joined(method: Method, op: Op) -> Mapping[str, Spec]:
    """Its tensors over the op, of an adapter that is to be merged."""
    method.refuse_merge(site_of(op))
    return method.tensors(site_of(op))


class Below:
    """A base layer, as a branch sees it."""

    def __init__(self, op: Op, base: Dense) -> None:
        self.op, self.dense = op, base

    def __call__(self, x: Tensor, /) -> Tensor:
        return self.op.apply(x, self.dense.weight, self.dense.bias)

    def base(self) -> Dense:
        return self.dense

    def plain(self) -> Dense:
        return self.dense

    def laid(self) -> Dense:
        return self.dense

    def bias(self) -> Tensor | None:
        return self.dense.bias


def told(method: Method, op: Op, matrix: Tensor, p: Params) -> Params:
    """`p` as its merge takes it, with what it has to know of the base `matrix` where elements depend on each other."""
    p = matrices(method, op, p)
    if not method.couples:
        return p
    return method.told(p, sum_rows(method.terms(matrix, p, WHOLE, exact_product)))


def magnitude(op: Op, x: Tensor, matrix: Tensor) -> Tensor:
    """[*batch, out]: the sum of the magnitudes of all terms of `apply`."""
    return op.apply(x.abs(), matrix.abs())


def stored_tiles(op: Op, step: int) -> list[slice]:
    count = site_of(op).weight.shape[0]
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]
