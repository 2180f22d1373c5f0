"""Every method over every op: a fresh one changes nothing; branch and merge agree; tiles, steps and undo."""

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from op_examples import EXAMPLES, GROUPED, IN, OUT, beside, shape_given, site_of
from rational import same_bits
from torch import Tensor

from surgery.core.arithmetic import exact_product, float_product, round_once, ulp
from surgery.core.elementwise import Elementwise
from surgery.core.method import Additive, Dense, Method, Params, Spec
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
    "PVERA": [{"r": 3, "pvera_dropout": 0.5}],
    "RANDLORA": [{"r": 3, "randlora_dropout": 0.5, "randlora_alpha": -7}, {"r": 12, "randlora_alpha": 3}],
}
# Settings that have no default, or whose default is no whole scaling.
NEEDED: Mapping[str, dict[str, Any]] = {
    "IA3": {"feedforward_modules": []},
    "ADALORA": {"init_r": 4, "lora_alpha": 4 + 1e-5},
    "VERA": {"r": 4},
    "PVERA": {"r": 4},
    "RANDLORA": {"r": 4, "randlora_alpha": 8},
}
ALLOTTED = {"linear", "conv1d", "convolution of one place", "convolution over two axes"}  # what AdaLoRA acts on
MATRICES = {"linear", "conv1d"}  # what methods with projections act on
UNFIT = {  # which refuse each other, and what is said of it; the last where it would be merged
    ("IA3", "embedding"): "an embedding",
    ("IA3", "scaled embedding"): "an embedding",
    ("IA3", "convolution over one axis"): "a Conv1d",
    ("IA3", "attention"): "an attention",
    **{("ADALORA", name): "AdaLoRA acts on" for name in EXAMPLES if name not in ALLOTTED},
    **{(method, name): "VeRA acts on" for method in ("VERA", "PVERA") for name in EXAMPLES if name not in MATRICES},
    **{("RANDLORA", name): "RandLoRA acts on" for name in EXAMPLES if name not in MATRICES},
    ("LORA", GROUPED): "in groups",
}

ONLY = {  # settings that are refused over other ops
    "lora_dropout": {"linear", "conv1d", "embedding", "convolution"},
    "use_dora": {"linear", "conv1d", "embedding", "convolution"},
    "lora_bias": {"linear", "conv1d", "convolution"},
    "use_qalora": {"linear"},
}


def made(name: str, **settings: Any) -> Method:
    return METHODS[name](**NEEDED.get(name, {}) | settings).method("layer")


CASES = [
    pytest.param(made(name, **settings), op, id=f"{name}-{index}-{example}")
    for name in METHODS
    for index, settings in enumerate([{}, *VARIANTS.get(name, [])])
    for example, op in EXAMPLES.items()
    if (name, example) not in UNFIT and not any(op.name not in ops and key in settings for key, ops in ONLY.items())
]
each_case = pytest.mark.parametrize(("method", "op"), CASES)
each_op = pytest.mark.parametrize("op", [op for op in EXAMPLES.values() if op.groups == 1], ids=lambda op: op.name)
each_pair = pytest.mark.parametrize(("name", "example"), [(n, e) for n in METHODS for e in EXAMPLES], ids=str)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def trained(method: Method, op: Op, dtype: torch.dtype = torch.float64) -> Params:
    """Every tensor of the method filled with normal numbers, as training would leave it."""
    return {role: torch.randn(spec.shape, dtype=dtype) for role, spec in method.tensors(site_of(op)).items()}


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
    assert {values.dtype for values in fresh.values()} == {torch.float32}
    assert all(bool(torch.isfinite(values).all()) for values in fresh.values())
    assert any(bool(values.any()) for values in fresh.values())  # all zero, and no gradient would ever flow


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
        assert read.op in (None, op.name)


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
    spread = magnitude(op, x, off.expand(OUT, IN))
    biases = beside(op, base.bias.abs() + merged.bias.abs())
    rounding = (IN + 2) * EPS * (magnitude(op, x, base.weight) + magnitude(op, x, merged.weight) + biases)
    assert bool((apart <= spread + rounding).all())
    effect = (branch - op.apply(x, base.weight, base.bias)).abs()
    assert float(effect.mean()) > 100 * float((spread + rounding).mean())  # else the law could not fail


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
    method, op = made(name).weighted(weight), EXAMPLES[example]
    if (name, example) in UNFIT:
        return
    p = {role: torch.randint(-3, 4, values.shape).float() for role, values in trained(method, op).items()}
    base = Dense(torch.randint(-9, 10, (OUT, IN)).float(), torch.randint(-9, 10, (OUT,)).float())
    x = given(op, torch.float32, 5, 3)
    x = x.round() if x.is_floating_point() else x
    branch = method.branch(x, Below(op, base), op, p, False)
    for product in (exact_product, float_product):
        merged = method.merge(base, matrices(method, op, p), WHOLE, product)
        assert torch.equal(branch, op.apply(x, merged.weight.float(), merged.bias))
    assert not torch.equal(branch, op.apply(x, base.weight, base.bias))


@each_case
def test_a_branch_is_differentiable_in_every_tensor(method: Method, op: Op):
    p = {role: values.requires_grad_() for role, values in trained(method, op).items()}
    x, matrix = given(op, torch.float64, 4), torch.randn(OUT, IN).double()
    method.branch(x, Below(op, Dense(matrix)), op, p, True).square().sum().backward()
    assert all(values.grad is not None and bool(values.grad.any()) for values in p.values())


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


@each_case
def test_the_spread_of_a_tile_is_that_tile_of_the_whole_spread(method: Method, op: Op):
    p = told(method, op, torch.randn(OUT, IN), trained(method, op, torch.bfloat16))
    whole = op.stored(method.spread(p, WHOLE).expand(OUT, IN))
    assert bool((whole > 0).all() if isinstance(method, Additive) else (whole >= 0).all())
    for rows in stored_tiles(op, 5):
        part = op.stored(method.spread(p, op.tile(rows))).expand(whole[rows].shape)
        assert torch.allclose(part, whole[rows], rtol=2 * OUT * IN * EPS, atol=0)  # plain sums, in any order


@each_case
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


@each_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_what_a_step_says_of_rounding_covers_the_merge_in_the_dtype_of_the_weight(
    method: Method, op: Op, dtype: torch.dtype
):
    w = torch.randn(OUT, IN).to(dtype)
    step = method.steps(told(method, op, w, trained(method, op, dtype)), WHOLE, exact_product)
    assert step is not None
    exact = step.apply(w.double())
    plain = step.seen(lambda values: values.to(dtype)).apply(w).double()
    held, outcome = step.rounded(w.double(), exact)
    assert bool(((plain - exact).abs() <= ulp(held, dtype) / 2 + ulp(outcome, dtype) / 2).all())
    off = step.apply(w.double() + 2.0**-6) - exact
    carried = step.carried(torch.full((OUT, IN), 2.0**-6).double())
    assert bool(((off.abs() - carried).abs() <= 4 * EPS * (w.double().abs() + exact.abs() + 1)).all())


@each_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_steps_in_the_memory_of_a_weight_are_the_same_and_leave_the_adapter_alone(
    method: Method, op: Op, dtype: torch.dtype
):
    w = torch.randn(OUT, IN).double()
    p = {role: values.to(dtype) for role, values in told(method, op, w, trained(method, op)).items()}
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


@each_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_merge_comes_back_to_the_bit_from_its_index(method: Method, op: Op, dtype: torch.dtype):
    if method.replaced_rows:  # what stood there is kept whole
        return
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
    assert not torch.equal(whole, stored)
    back = [restorer.restore(whole[rows], steps(rows), dtype) for rows in stored_tiles(op, 5)]
    assert same_bits(torch.cat(back), stored)


@each_case
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
    for role in trained(method, op):
        p = trained(method, op)
        p[role].view(-1)[0] = bad
        merges = [one for one in (method, method.for_bias()) if one is not None]
        with pytest.raises(ValueRangeError, match="NaN or infinity"):
            _ = [one.steps(matrices(method, op, p), WHOLE, exact_product) for one in merges]


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
