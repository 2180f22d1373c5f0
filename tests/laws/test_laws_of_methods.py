"""Every method over every op: a fresh one changes nothing; branch and merge agree; tiles, steps and undo."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from op_examples import EXAMPLES, GROUPED, IN, OUT, beside, shape_given, site_of
from rational import same_bits
from torch import Tensor

from surgery.core.arithmetic import exact_product, float_product, round_once, ulp
from surgery.core.elementwise import Elementwise, Growth
from surgery.core.method import Additive, Dense, Method, Mixing, Params, Spec
from surgery.core.op import WHOLE, Op
from surgery.core.site import Site, TensorInfo
from surgery.core.sums import sum_rows
from surgery.core.turned import turned
from surgery.core.undo import Recorder, Restorer, accumulate
from surgery.errors import MatchError, ValueRangeError
from surgery.methods import METHODS
from surgery.methods.adalora import AdaLora
from surgery.methods.lora import Lora
from surgery.ops.bias import Bias

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
    "PVERA": [{"r": 3, "pvera_dropout": 0.5}],
    "MISS": [{"r": 5, "miss_dropout": 0.5}, {"init_weights": "mini", "mini_r": 4}],
    "DELORA": [{"r": 3, "delora_lambda": -0.5}, {"lambda_pattern": {"layer": 4}, "module_dropout": 0.5}],
    "GRALORA": [
        {"r": 4, "hybrid_r": 3, "alpha": -3, "gralora_dropout": 0.5},
        {"r": 6, "gralora_k": 1, "alpha": 5},
    ],
    "HIRA": [{"r": 2, "init_weights": "gaussian"}, {"rank_pattern": {"layer": 5}, "hira_dropout": 0.5}],
    "LOKR": [
        {"r": 1, "alpha": 5, "use_effective_conv2d": True},
        {"r": 1, "alpha": -0.3, "decompose_both": True, "decompose_factor": 4, "init_weights": "lycoris"},
        {"r": 2, "decompose_factor": 1, "rank_dropout": 0.2, "rank_dropout_scale": True},
    ],
    "RANDLORA": [{"r": 3, "randlora_dropout": 0.5, "randlora_alpha": -7}, {"r": 12, "randlora_alpha": 3}],
    "SHIRA": [{"r": 5, "random_seed": 3}],
    "C3A": [{"block_size": 1}, {"block_size": 5, "block_size_pattern": {"layer": 2}}],
}
# Settings that have no default, or whose default is no whole scaling.
NEEDED: Mapping[str, dict[str, Any]] = {
    "IA3": {"feedforward_modules": []},
    "ADALORA": {"init_r": 4, "lora_alpha": 4 + 1e-5},
    "VERA": {"r": 4},
    "OFT": {"oft_block_size": 4},
    "TRAINABLE_TOKENS": {"token_indices": [7, 0, 3]},
    "PVERA": {"r": 4},
    "MISS": {"r": 4},  # of which IN is no multiple
    "RANDLORA": {"r": 4, "randlora_alpha": 8},
    "SHIRA": {"r": 2},
    "C3A": {"block_size": 2, "init_weights": True},
    "HRA": {"r": 4},
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
    ("HIRA", "attention"): "an attention",
    ("HIRA", GROUPED): "in 2 groups",
    **{("ADALORA", name): "AdaLoRA acts on" for name in EXAMPLES if name not in ALLOTTED},
    **{(method, name): "VeRA acts on" for method in ("VERA", "PVERA") for name in EXAMPLES if name not in MATRICES},
    **{("MISS", name): "MiSS acts on Linear" for name in EXAMPLES if name != "linear"},
    **{("RANDLORA", name): "RandLoRA acts on" for name in EXAMPLES if name not in MATRICES},
    **{("SHIRA", name): "SHiRA acts on Linear" for name in EXAMPLES if name != "linear"},
    **{("C3A", name): "C3A acts on Linear" for name in EXAMPLES if name != "linear"},
    **{("BEFT", name): "BEFT acts on" for name in EXAMPLES if name != "linear"},
    ("LORA", GROUPED): "in groups",
    **{("LOHA", name): "LoHa acts on" for name in EXAMPLES if name not in OF_LYCORIS},
    ("OFT", "conv1d"): "its op is conv1d",
    ("OFT", "attention"): "its op is attention",
    ("OFT", "convolution over one axis"): "a Conv1d",
    ("OFT", "convolution over two axes"): "PEFT's OFT changes the outputs before anything is trained",
    ("OFT", "convolution over three axes"): "a Conv3d",
    ("OFT", GROUPED): r"a convolution over \[2, 1\]",
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
UNEVEN = {"DELORA", "C3A", "HRA"}  # which make fractions or roots of whole numbers

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
each_mixing, each_with_steps = (
    pytest.mark.parametrize(("method", "op"), [one for one in CASES if one.values[0].mixes == mixes])
    for mixes in (True, False)
)
# Those that treat each element by itself, or by sums; what replaces rows says nothing of what stood there.
each_step = pytest.mark.parametrize(
    ("method", "op"), [one for one in CASES if not one.values[0].mixes and not one.values[0].replaced_rows]
)
each_lasting = pytest.mark.parametrize(("method", "op"), [one for one in CASES if not one.values[0].replaced_rows])
each_op = pytest.mark.parametrize("op", [op for op in EXAMPLES.values() if op.groups == 1], ids=lambda op: op.name)
each_pair = pytest.mark.parametrize(("name", "example"), [(n, e) for n in AT_SITES for e in EXAMPLES], ids=str)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def trained(method: Method, op: Op, dtype: torch.dtype = torch.float64) -> Params:
    """Every tensor of the method filled with normal numbers, as training would leave it; one of indices as it began."""
    fresh = begun(method, op, Dense(torch.ones(OUT, IN)))
    return of_floats(fresh, lambda values: torch.randn(values.shape, dtype=dtype))


def of_floats(p: Params, become: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """`p`, and what becomes of its tensors, but for those of indices."""
    return {role: become(values) if values.is_floating_point() else values for role, values in p.items()}


def begun(method: Method, op: Op, base: Dense) -> Params:
    """A fresh adapter with what its sites share, which is drawn for all of them."""
    drawn = {role: torch.randn(spec.shape) for role, spec in method.tensors(site_of(op)).items() if spec.shared}
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


@each_case
def test_tensors_are_shaped_as_init_makes_them(method: Method, op: Op):
    specs, fresh = method.tensors(site_of(op)), method.init(site_of(op), lambda: Dense(torch.randn(OUT, IN)))
    own = {role: spec.shape for role, spec in specs.items() if not spec.shared}
    assert {role: tuple(values.shape) for role, values in fresh.items()} == own
    assert {values.dtype for values in fresh.values()} - {torch.int32} == {torch.float32}
    assert all(bool(torch.isfinite(values).all()) for values in fresh.values())


@each_case
def test_tensors_of_indices_are_never_trained_and_files_hold_them_in_int32(method: Method, op: Op):
    fresh = begun(method, op, Dense(torch.ones(OUT, IN)))
    spellings = {ending: one for config in METHODS.values() for ending, one in config.spellings.items()}
    for role, spec in method.tensors(site_of(op)).items():
        spelled = spellings.get(spec.spelling)  # of those that are not in files there is none
        assert (spelled is not None and spelled.integers) == (fresh[role].dtype == torch.int32)
        assert spec.fixed or fresh[role].is_floating_point()


@each_case
def test_a_fresh_adapter_has_a_gradient(method: Method, op: Op):
    matrix = torch.randn(OUT, IN).double()
    p = of_floats(begun(method, op, Dense(matrix)), lambda values: values.double().requires_grad_())
    out = method.branch(given(op, torch.float64, 4), Below(op, Dense(matrix)), op, p, False)
    (out * torch.randn(out.shape)).sum().backward()  # by no norm, which rotations keep
    assert any(values.grad is not None and bool(values.grad.any()) for values in p.values())


@each_pair
def test_tensors_are_spelled_as_the_config_reads_them(name: str, example: str):
    config, op = METHODS[name], EXAMPLES[example]
    if (name, example) in UNFIT:
        with pytest.raises(MatchError, match=f"layer: .*{UNFIT[name, example]}"):
            joined(made(name), op)
        return
    specs = joined(made(name), op)
    assert len({spec.spelling for spec in specs.values()}) == len(specs)
    for role, spec in specs.items():
        if spec.shared:
            assert config.shared[spec.spelling] == role
            continue
        read = config.spellings[spec.spelling]
        assert read.role == role
        assert read.op in (None, op.name) or made(name).replaced_rows  # a head's lie as those of an embedding


@each_pair
def test_the_roles_of_a_site_are_those_of_a_form_of_its_config(name: str, example: str):
    for settings in [{}, *VARIANTS.get(name, [])] if (name, example) not in UNFIT else []:
        config, op = METHODS[name](**NEEDED.get(name, {}) | settings), EXAMPLES[example]
        if not any(op.name not in ops and key in settings for key, ops in ONLY.items()):
            specs, read = config.method("layer").tensors(site_of(op)).values(), config.endings()
            held = [read[spec.spelling] for spec in specs if spec.spelling in read]  # of those that files hold
            assert [one.alone for one in held] == [True] or {one.role for one in held} in config.forms()


@each_case
@pytest.mark.parametrize("training", [False, True], ids=["evaluating", "training"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_fresh_adapter_leaves_the_output_equal_to_the_bit(method: Method, op: Op, training: bool, dtype: torch.dtype):
    base, x = Dense(torch.randn(OUT, IN, dtype=dtype), torch.randn(OUT, dtype=dtype)), given(op, dtype, 4, 3)
    out = method.branch(x, Below(op, base), op, begun(method, op, base), training)
    assert same_bits(out.to(dtype), op.apply(x, *base))


@each_op
@pytest.mark.parametrize("r", [2, 8])
def test_loras_orthogonal_start_leaves_the_output_equal_within_its_rounding(op: Op, r: int):
    method = METHODS["LORA"](r=r, init_lora_weights="orthogonal").method("layer")
    base = Dense(torch.zeros(OUT, IN).double())
    p = {role: values.double() for role, values in method.init(site_of(op), lambda: base).items()}
    x = given(op, torch.float64, 4)
    moved = method.branch(x, Below(op, base), op, p, False).abs()
    # float32 rounds the entries of a rotation and of A and B, each a sum of up to r terms.
    held = matrices(method, op, p)
    size = abs(method.scaling) * magnitude(op, x, held["B"].abs() @ held["A"].abs())
    assert bool((moved <= 4 * r * torch.finfo(torch.float32).eps * size).all())
    assert bool(p["A"].any())
    assert bool(p["B"].any())


@each_case
def test_a_fresh_adapter_leaves_the_merged_weight_equal(method: Method, op: Op):
    matrix = torch.randn(OUT, IN, dtype=torch.float64)
    fresh = begun(method, op, Dense(matrix))
    merged = method.merge(Dense(matrix), matrices(method, op, fresh), WHOLE, exact_product)
    assert torch.equal(merged.weight, matrix)


@each_case
def test_a_branch_is_the_merged_forward_within_the_spread(method: Method, op: Op):
    base = Dense(torch.randn(OUT, IN).double(), torch.randn(OUT).double())
    p, x = trained(method, op), given(op, torch.float64, 5, 3)
    merged = method.merge(base, matrices(method, op, p), WHOLE, exact_product)
    branch = method.branch(x, Below(op, base), op, p, False)
    apart = (branch - op.apply(x, merged.weight, merged.bias)).abs()
    # Each weight may be off by the spread; each forward sums at most in + 2 terms, rounded each time.
    p = told(method, op, base.weight, p)
    off = method.spread(p, WHOLE) + method.relative_spread(p, WHOLE) * merged.weight.abs()
    if isinstance(method, Mixing):
        off = method.strayed(base.weight, torch.zeros(OUT, IN).double(), method.prepared(p, exact_product), WHOLE)
    off = off + method.base_spread(p, WHOLE, torch.float64) * base.weight.abs()
    spread = magnitude(op, x, off.expand(OUT, IN))
    biases = beside(op, base.bias.abs() + merged.bias.abs())
    rounding = (IN + 2) * EPS * (magnitude(op, x, base.weight) + magnitude(op, x, merged.weight) + biases)
    assert bool((apart <= spread + rounding).all())
    effect = (branch - op.apply(x, base.weight, base.bias)).abs()
    assert float(effect.mean()) > 100 * float((spread + rounding).mean())  # else the law could not fail


@each_case
def test_a_branch_over_a_layer_that_nothing_watches_is_the_same(method: Method, op: Op):
    base = Dense(torch.randn(OUT, IN).double(), torch.randn(OUT).double())
    p, x = trained(method, op), given(op, torch.float64, 5, 3)
    plain = Below(op, base)
    plain.plain = lambda: base  # type: ignore[method-assign]
    one, other = (method.branch(x, below, op, p, False) for below in (Below(op, base), plain))
    merged = method.merge(base, matrices(method, op, p), WHOLE, float_product).weight
    # Two forwards of at most in + 2 terms, rounded each time; and the sum of weight and delta.
    size = magnitude(op, x, base.weight) + magnitude(op, x, merged) + beside(op, base.bias.abs())
    assert bool(((one - other).abs() <= 2 * (IN + 3) * EPS * size).all())


@each_case
def test_the_product_of_factors_is_all_that_a_method_adds(method: Method, op: Op):
    p = trained(method, op)
    factors = method.factors(p)
    if factors is None:  # which those with products in them must have
        assert type(method) not in {Lora, AdaLora} or max(values.dim() for values in p.values()) > 2
        return
    B, A = factors
    merged = method.merge(Dense(torch.zeros(OUT, IN).double()), matrices(method, op, p), WHOLE, float_product)
    # Of each of r products three factors and the sum are rounded on either side.
    assert bool(((B @ A - merged.weight).abs() <= 2 * (B.shape[1] + 3) * EPS * (B.abs() @ A.abs())).all())


@each_case
def test_one_that_turns_adds_with_turned_factors_its_delta_transposed_to_the_bit(method: Method, op: Op):
    if not method.turns or op.kernel or op.stack:
        assert type(method) is not Lora or op.kernel or op.stack
        return
    p = trained(method, op)
    wide = method.merge(Dense(torch.zeros(OUT, IN).double()), matrices(method, op, p), WHOLE, exact_product)
    high = method.merge(Dense(torch.zeros(IN, OUT).double()), turned(p), WHOLE, exact_product)
    assert torch.equal(high.weight, wide.weight.mT)
    assert bool(wide.weight.all())


@each_pair
@pytest.mark.parametrize("weight", [1.0, -0.5, 2.0])
def test_whole_numbers_make_branch_and_merged_forward_equal_to_the_bit(name: str, example: str, weight: float):
    method, op = made(name), EXAMPLES[example]
    if (name, example) in UNFIT or name in UNEVEN or (method.replaced_rows and weight != 1):  # which is refused
        return
    method = method.weighted(weight)
    p = of_floats(trained(method, op), lambda values: torch.randint(-3, 4, values.shape).float())
    base = Dense(torch.randint(-9, 10, (OUT, IN)).float(), torch.randint(-9, 10, (OUT,)).float())
    x = given(op, torch.float32, 5, 3)
    x = x.round() if x.is_floating_point() else x
    branch = method.branch(x, Below(op, base), op, p, False)
    for product in (exact_product, float_product):
        merged = method.merge(base, matrices(method, op, p), WHOLE, product)
        assert torch.equal(branch, op.apply(x, merged.weight.float(), merged.bias.float()))
    assert not torch.equal(branch, op.apply(x, base.weight, base.bias))


@each_case
def test_a_branch_is_differentiable_in_every_tensor(method: Method, op: Op):
    p = of_floats(trained(method, op), lambda values: values.requires_grad_())
    x, matrix = given(op, torch.float64, 4), torch.randn(OUT, IN).double()
    method.branch(x, Below(op, Dense(matrix)), op, p, True).square().sum().backward()
    assert all(values.grad is not None and bool(values.grad.any()) for values in p.values() if values.requires_grad)


@each_case
@pytest.mark.parametrize("step", [1, 4, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_merge_of_tiles_is_the_merge_of_the_whole_to_the_bit(method: Method, op: Op, step: int, dtype: torch.dtype):
    stored = op.stored(torch.randn(OUT, IN)).contiguous().to(dtype).double()
    p = told(method, op, op.matrix(stored), trained(method, op, torch.float32))
    whole = op.stored(method.merge(Dense(op.matrix(stored)), p, WHOLE, exact_product).weight)
    for rows in stored_tiles(op, step):
        part = method.merge(Dense(op.matrix(stored[rows])), p, op.tile(rows), exact_product).weight
        assert same_bits(op.stored(part), whole[rows])
        assert same_bits(round_once(op.stored(part), dtype), round_once(whole, dtype)[rows])


@each_with_steps
def test_the_spread_of_a_tile_is_that_tile_of_the_whole_spread(method: Method, op: Op):
    p = told(method, op, torch.randn(OUT, IN), trained(method, op, torch.bfloat16))
    whole = op.stored(method.spread(p, WHOLE).expand(OUT, IN))
    assert bool((whole >= 0).all())
    if isinstance(method, Additive):
        added = op.stored(method.steps(p, WHOLE, exact_product).values.expand(OUT, IN))
        assert bool((whole > 0)[added != 0].all())
    for rows in stored_tiles(op, 5):
        part = op.stored(method.spread(p, op.tile(rows))).expand(whole[rows].shape)
        assert torch.allclose(part, whole[rows], rtol=2 * OUT * IN * EPS, atol=0)  # plain sums, in any order
    if method.of_base:
        whole = op.stored(method.base_spread(p, WHOLE, torch.bfloat16))
        parts = [op.stored(method.base_spread(p, op.tile(rows), torch.bfloat16)) for rows in stored_tiles(op, 5)]
        assert torch.allclose(torch.cat(parts), whole, rtol=2 * OUT * IN * EPS, atol=0)
        assert bool((whole > 0).all())


@each_step
def test_steps_are_the_merge_and_undo_takes_them_back(method: Method, op: Op):
    w, fitted = torch.randn(OUT, IN).double(), matrices(method, op, trained(method, op))
    assert (method.steps(fitted, WHOLE, exact_product) is None) == bool(method.couples)
    p = told(method, op, w, trained(method, op))
    step = method.steps(p, WHOLE, exact_product)
    assert step is not None
    step = step.seen(lambda values: values.expand(OUT, IN))
    merged = method.merge(Dense(w), p, WHOLE, exact_product).weight
    assert same_bits(step.apply(w), merged)
    # Two roundings, of the step and of its inverse: half an eps each of what it passes through.
    assert bool(((step.undo(merged) - w).abs() <= EPS * step.reach(merged.abs().clone())).all())
    where = torch.tensor([5, 0, OUT * IN - 1])
    assert same_bits(step.at(where).apply(w.flatten()[where]), merged.flatten()[where])
    higher = step.apply(torch.nextafter(w, torch.tensor(math.inf).double()))
    falls = step.falls()
    rises = torch.ones(OUT, IN, dtype=torch.bool) if falls is None else ~falls
    assert bool(torch.where(rises, higher >= merged, higher <= merged).all())


@each_step
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_what_a_step_says_of_rounding_covers_the_merge_in_the_dtype_of_the_weight(
    method: Method, op: Op, dtype: torch.dtype
):
    w = torch.randn(OUT, IN).to(dtype)
    p = told(method, op, w, trained(method, op, dtype))
    step = method.steps(p, WHOLE, exact_product)
    assert step is not None
    exact = step.apply(w.double())
    narrow = step.seen(lambda values: values.to(dtype))
    plain = (w + w * narrow.values if isinstance(step, Growth) else narrow.apply(w)).double()
    held, outcome = step.rounded(w.double(), exact)
    base = method.base_spread(p, WHOLE, dtype) * w.double().abs()
    assert bool(((plain - exact).abs() <= ulp(held, dtype) / 2 + ulp(outcome, dtype) / 2 + base).all())
    off = step.apply(w.double() + 2.0**-6) - exact
    carried = step.carried(torch.full((OUT, IN), 2.0**-6).double())
    assert bool(((off.abs() - carried).abs() <= 4 * EPS * (w.double().abs() + exact.abs() + 1)).all())


@each_step
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_steps_in_the_memory_of_a_weight_are_the_same_and_leave_the_adapter_alone(
    method: Method, op: Op, dtype: torch.dtype
):
    w = torch.randn(OUT, IN).double()
    p = of_floats(told(method, op, w, trained(method, op)), lambda values: values.to(dtype))
    before = {role: values.clone() for role, values in p.items()}
    for one in (method, method.for_bias()):
        step = None if one is None else one.steps(p, WHOLE, exact_product)
        if step is not None:
            step = step.seen(lambda values: values.expand(OUT, IN))
            wanted = step.apply(w)
            assert same_bits(step.onto(w.clone()), wanted)
    assert all(same_bits(values, before[role]) for role, values in p.items())


@each_case
def test_a_method_that_changes_a_bias_does_so_as_its_steps_over_a_matrix_of_one_column(method: Method, op: Op):
    p, base = matrices(method, op, trained(method, op)), Dense(torch.randn(OUT, IN).double(), torch.randn(OUT).double())
    merged, on_bias = method.merge(base, p, WHOLE, exact_product), method.for_bias()
    if on_bias is None:
        assert merged.bias is base.bias
        return
    for rows in (slice(0, OUT), slice(3, 7)):
        step = on_bias.steps(p, Bias().tile(rows), exact_product)
        assert step is not None
        assert same_bits(step.seen(Bias().stored).apply(base.bias[rows]), merged.bias[rows])
    assert not torch.equal(merged.bias, base.bias)


@each_step
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_merge_comes_back_to_the_bit_from_its_index(method: Method, op: Op, dtype: torch.dtype):
    stored = op.stored(torch.randn(OUT, IN)).to(dtype)
    p = told(method, op, op.matrix(stored), trained(method, op))

    def steps(rows: slice) -> list[Elementwise]:
        step = method.steps(p, op.tile(rows), exact_product)
        assert step is not None
        return [step.seen(lambda values: op.stored(values).expand(stored[rows].shape))]

    recorder, merged = Recorder(), []
    for rows in stored_tiles(op, 4):
        merged.append(round_once(accumulate(stored[rows].double(), steps(rows)), dtype))
        recorder.add(stored[rows], merged[-1], steps(rows))
    assert recorder.exact
    restorer, whole = Restorer(recorder.streams()), torch.cat(merged)
    assert torch.equal(whole, stored) == method.leaves_weight
    back = [restorer.restore(whole[rows], steps(rows), dtype) for rows in stored_tiles(op, 5)]
    assert same_bits(torch.cat(back), stored)


@each_lasting
@pytest.mark.parametrize("weight", [0.5, -2.0, 0.0])
def test_a_weight_scales_what_a_merge_changes(method: Method, op: Op, weight: float):
    p, w = matrices(method, op, trained(method, op)), torch.randn(OUT, IN).double()
    merged, weighted = (
        one.merge(Dense(w), p, WHOLE, exact_product).weight for one in (method, method.weighted(weight))
    )
    bound = 8 * EPS * (1 + abs(weight)) * (w.abs() + merged.abs())  # of some four roundings
    assert bool((((weighted - w) - weight * (merged - w)).abs() <= bound).all())
    assert same_bits(method.weighted(1.0).merge(Dense(w), p, WHOLE, exact_product).weight, merged)
    assert method.weighted(weight).settings() != method.settings()
    assert all(isinstance(text, str) for pair in method.settings().items() for text in pair)


@each_case
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_tensors_that_are_not_finite_are_refused_where_a_merge_begins(method: Method, op: Op, bad: float):
    for role in (role for role, values in trained(method, op).items() if values.is_floating_point()):
        p = trained(method, op)
        p[role].view(-1)[0] = bad
        merges = [one for one in (method, method.for_bias()) if one is not None]
        with pytest.raises(ValueRangeError, match="NaN or infinity"):
            _ = [
                one.steps(one.prepared(matrices(method, op, p), exact_product), WHOLE, exact_product) for one in merges
            ]


@each_mixing
def test_what_a_base_is_off_by_is_carried_through_a_mix_and_no_further_than_told(method: Mixing, op: Op):
    w, p = torch.randn(OUT, IN).double(), method.prepared(matrices(method, op, trained(method, op)), exact_product)
    error = torch.zeros(OUT, IN).double()
    error[3, 5] = 2.0**-6
    moved, here = (method.merge(Dense(one), p, WHOLE, exact_product).weight for one in (w + error, w))
    allowed = method.strayed(w, error, p, WHOLE)
    assert bool(((moved - here).abs() <= allowed).all())
    assert bool(((moved - here).abs() > method.strayed(w, 0 * error, p, WHOLE)).any())  # else it could not fail
    assert method.steps(p, WHOLE, exact_product) is None


@pytest.mark.parametrize("name", [name for name in METHODS if METHODS[name].shared])
def test_what_all_sites_share_is_drawn_alike_each_time_and_fits_each_of_them(name: str):
    config = METHODS[name](**NEEDED[name])
    shapes = [(OUT, IN), (5, 30), (9, 9)]
    sites = [Site("layer", {"weight": TensorInfo("w", torch.float32, shape)}, EXAMPLES["linear"]) for shape in shapes]
    drawn, again = config.drawn(sites), config.drawn(sites)
    assert drawn.keys() == {*config.shared.values()}
    assert all(same_bits(values, again[role]) for role, values in drawn.items())
    for site in sites:
        for role, spec in config.method("layer").tensors(site).items():
            assert spec.shared == (role in drawn)
            assert not spec.shared or (spec.fixed and spec.fits(tuple(drawn[role].shape)))
    smaller = config.drawn(sites[:1])
    assert not all(config.method("layer").tensors(sites[1])[role].fits(tuple(v.shape)) for role, v in smaller.items())
    others = METHODS[name](**NEEDED[name], projection_prng_key=1).drawn(sites)
    assert not any(torch.equal(values, others[role]) for role, values in drawn.items())
