"""Every method over every op: its tensors, a fresh one that changes nothing, a branch that agrees with the merge."""

import pytest
import torch
from method_examples import (
    EPS,
    NEEDED,
    ONLY,
    UNEVEN,
    UNFIT,
    VARIANTS,
    Below,
    begun,
    each_case,
    each_idle,
    each_op,
    each_pair,
    given,
    joined,
    made,
    magnitude,
    matrices,
    of_floats,
    told,
    trained,
)
from op_examples import EXAMPLES, IN, OUT, beside, site_of
from rational import same_bits

from surgery.core.arithmetic import exact_product, float_product
from surgery.core.method import Dense, Method, Mixing
from surgery.core.op import WHOLE, Op
from surgery.core.site import Site, TensorInfo
from surgery.core.sums import sum_rows
from surgery.core.turned import turned
from surgery.errors import MatchError
from surgery.methods import METHODS
from surgery.methods.adalora import AdaLora
from surgery.methods.lora import Lora
from surgery.methods.projections import ProjectionsConfig


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


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


@each_idle
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


@each_idle
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
    off = method.spread_over(base.weight, merged.weight, p, WHOLE, torch.float64)
    if isinstance(method, Mixing):
        off = method.strayed(base.weight, torch.zeros(OUT, IN).double(), method.prepared(p, exact_product), WHOLE)
    spread = magnitude(op, x, off.expand(OUT, IN))
    on_bias = method.for_bias()
    if on_bias is not None and on_bias.couples:
        p = on_bias.told(p, sum_rows(on_bias.terms(base.weight, p, WHOLE, exact_product)))
        spread = spread + beside(op, on_bias.spread(p, WHOLE).squeeze(1))
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
    p = of_floats(trained(method, op), lambda values: values.requires_grad_(bool(values.any())))
    x, base = given(op, torch.float64, 4), Dense(torch.randn(OUT, IN).double(), torch.randn(OUT).double())
    method.branch(x, Below(op, base), op, p, True).square().sum().backward()
    assert all(values.grad is not None and bool(values.grad.any()) for values in p.values() if values.requires_grad)


@pytest.mark.parametrize("name", [name for name in METHODS if issubclass(METHODS[name], ProjectionsConfig)])
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
