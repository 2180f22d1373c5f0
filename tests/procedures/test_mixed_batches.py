"""Mixed batches: each row is what it is alone under its adapter, and nothing of them is left.

Where bits are compared, weights and inputs are small whole numbers and scalings powers of two: every sum is exact, so
no order of summation can differ.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import surgery
from surgery import (
    AdaLoraConfig,
    AdapterConfig,
    BeftConfig,
    C3AConfig,
    DeloraConfig,
    GraloraConfig,
    HiraConfig,
    HRAConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    MissConfig,
    OFTConfig,
    ShiraConfig,
    StateError,
    TrainableTokensConfig,
    UsageError,
)
from surgery.methods import METHODS

BASE = "__base__"
NAMES = ["a", BASE, "b", "a", "c", BASE, "b"]
ROWS = len(NAMES)
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(4, 6), (ROWS, 4)),
    "linear of sequences": (lambda: nn.Linear(4, 6), (ROWS, 3, 4)),
    "conv1d": (lambda: Conv1D(6, 4), (ROWS, 3, 4)),
    "embedding": (lambda: nn.Embedding(9, 6), (ROWS, 3)),
    "embedding of one index": (lambda: nn.Embedding(9, 6), (ROWS,)),
    "convolution": (lambda: nn.Conv2d(4, 6, 2, padding=1), (ROWS, 4, 3, 3)),
    "convolution in groups": (lambda: nn.Conv1d(4, 6, 2, groups=2), (ROWS, 4, 3)),
}
PLAIN = {"lora_alpha": 4, "init_lora_weights": False, "target_modules": "0|2"}
RULES: dict[str, Callable[[int], AdapterConfig]] = {
    "lora": lambda r: LoraConfig(r=r, **PLAIN),
    "lora with a bias": lambda r: LoraConfig(r=r, lora_bias=True, **PLAIN),
    "dora": lambda r: LoraConfig(r=r, use_dora=True, **PLAIN),
    "ia3": lambda _: IA3Config(target_modules="0|2", feedforward_modules=[]),
    "ia3 of inputs": lambda _: IA3Config(target_modules="0|2", feedforward_modules="0|2"),
    "adalora": lambda r: AdaLoraConfig(init_r=r, target_r=1, total_step=9, target_modules="0|2"),
    "oft": lambda _: OFTConfig(oft_block_size=4, target_modules="0|2"),
    "road": lambda _: surgery.RoadConfig(group_size=2, target_modules="0|2"),
    "boft": lambda _: surgery.BOFTConfig(boft_block_size=2, target_modules="0|2"),
    "hra": lambda r: HRAConfig(r=r, target_modules="0|2"),
    "c3a": lambda _: C3AConfig(block_size=2, target_modules="0|2"),
    "beft": lambda _: BeftConfig(target_modules="0|2"),
    "trainable tokens": lambda r: TrainableTokensConfig(token_indices=[1, 0, 3, 4][:r], target_modules="0|2"),
    "ln_tuning": lambda _: LNTuningConfig(target_modules="0|2"),
    "miss": lambda r: MissConfig(r=r, target_modules="0|2"),
    "loha": lambda r: LoHaConfig(r=r, alpha=4, init_weights=False, target_modules="0|2"),
    "lokr": lambda r: LoKrConfig(r=r, alpha=4, init_weights=False, target_modules="0|2"),
    "shira": lambda r: ShiraConfig(r=r // 2, target_modules="0|2"),
    "fourierft": lambda r: surgery.FourierFTConfig(n_frequency=3 * r, target_modules="0|2"),
    "waveft": lambda r: surgery.WaveFTConfig(n_frequency=2 * r, target_modules="0|2"),
    "hira": lambda r: HiraConfig(r=r, target_modules="0|2"),
    "delora": lambda r: DeloraConfig(r=r, target_modules="0|2"),
    "gralora": lambda r: GraloraConfig(r=r, alpha=4 * r, target_modules="0|2"),
    "glora": lambda r: surgery.GloraConfig(r=r, target_modules="0|2"),
    "supertuning": lambda r: surgery.SupertuningConfig(sparsity=0.5, r=r, target_modules="0|2"),
    "vera": lambda r: surgery.VeraConfig(r=r, target_modules="0|2"),
    "pvera": lambda r: surgery.PveraConfig(r=4 * r, target_modules="0|2"),  # of some d that is not zero
    "vblora": lambda r: surgery.VBLoRAConfig(r=r, num_vectors=5, vector_length=2, target_modules="0|2"),
    "unilora": lambda r: surgery.UniLoraConfig(r=r, theta_d_length=9, target_modules="0|2"),
    "tinylora": lambda r: surgery.TinyLoraConfig(r=min(r, 2), u=3, target_modules="0|2"),
    "randlora": lambda r: surgery.RandLoraConfig(r=r, randlora_alpha=8, target_modules="0|2"),
}
ON_LINEAR = ("linear", "linear of sequences", "conv1d")
EVERYWHERE = ("lora", "ln_tuning")
UNEVEN = ("delora", "oft", "boft", "road", "hra", "c3a", "vblora", "fourierft")  # whose numbers are no whole ones
WHERE: dict[str, set[str]] = {  # the layers that a rule is tried on, if not on linear ones
    **{rule: {*ON_LINEAR, "convolution"} for rule in ("ia3", "ia3 of inputs", "adalora")},
    **{
        rule: {"linear", "linear of sequences"}
        for rule in ("trainable tokens", "miss", "shira", "supertuning", "delora", "glora", "beft", "oft", "hra", "c3a")
    },
    "road": {"linear", "linear of sequences"},
    "boft": {"linear", "linear of sequences", "convolution"},
    "hira": {one for one in LAYERS if "groups" not in one},
    **{rule: {one for one in LAYERS if one.startswith("linear") or "convolution" in one} for rule in ("loha", "lokr")},
}
CASES = [
    (layer, rule) for layer in LAYERS for rule in RULES if (rule in EVERYWHERE or layer in WHERE.get(rule, ON_LINEAR))
]


def whole_numbers(net: nn.Module) -> nn.Module:
    for values in filter(Tensor.is_floating_point, (*net.parameters(), *net.buffers())):  # buffers are what is shared
        values.data = torch.randint(-4, 5, values.shape).double()
    return net


def three(net: nn.Module, rule: str = "lora") -> nn.Module:
    """Under adapters of different ranks; the first runs."""
    for name, r in zip("abc", (2, 4, 2), strict=True):
        surgery.inject(net, RULES[rule](r), adapter_name=name)
    return whole_numbers(net)


def linear(rule: str = "lora") -> nn.Module:
    torch.manual_seed(0)
    return three(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)), rule)


def inputs(layer: str = "linear") -> Tensor:
    torch.manual_seed(1)
    shape = LAYERS[layer][1]
    return torch.randint(0, 9, shape) if "embedding" in layer else torch.randint(-4, 5, shape).double()


def alone(net: nn.Module, x: Tensor, name: str) -> Tensor:
    with surgery.set_adapter(net, [] if name == BASE else name):
        return net(x)


def each_alone(net: nn.Module, x: Tensor, names: list[str]) -> Tensor:
    return torch.cat([alone(net, x[row : row + 1], name) for row, name in enumerate(names)])


def mixed(net: nn.Module, x: Tensor, names: list[str]) -> Tensor:
    with surgery.mixed_batch(net, names):
        return net(x)


def test_every_method_stands_in_the_tables() -> None:
    assert {type(RULES[rule](2)) for rule in RULES} == set(METHODS.values())


@pytest.mark.parametrize(("layer", "rule"), CASES)
def test_each_row_is_to_the_bit_what_it_is_alone(layer: str, rule: str) -> None:
    torch.manual_seed(0)
    net, x = three(nn.Sequential(LAYERS[layer][0]()), rule).eval(), inputs(layer)
    found = mixed(net, x, NAMES)
    # Sums of fractions, of at most four and four terms, are taken in another order for a row alone.
    room = 2 * (4 + 4) * torch.finfo(found.dtype).eps * float(found.detach().abs().max()) if rule in UNEVEN else 0.0
    assert bool(((found - each_alone(net, x, NAMES)).abs() <= room).all())
    others = torch.stack([alone(net, x, name) for name in ("a", "b", "c", BASE)])
    assert ((others - found).abs() > room).flatten(2).any(2).sum() == 3 * ROWS  # rows do differ by adapter


@pytest.mark.parametrize("names", [["a"] * 7, [BASE] * 7, ["c"] * 3 + ["a"] * 4, list("abcabca")], ids=str)
def test_any_share_of_a_batch_may_be_of_one_adapter(names: list[str]) -> None:
    net, x = linear(), inputs()
    assert torch.equal(mixed(net, x, names), each_alone(net, x, names))


def test_adapters_may_lie_over_different_layers_and_be_of_different_methods() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    for name, targets in {"a": ["0"], "b": ["1", "2"]}.items():
        surgery.inject(net, LoraConfig(**PLAIN | {"r": 2, "target_modules": targets}), adapter_name=name)
    surgery.inject(net, IA3Config(target_modules=["0", "2"], feedforward_modules=["2"]), adapter_name="c")
    x = inputs()
    assert torch.equal(mixed(whole_numbers(net), x, NAMES), each_alone(net, x, NAMES))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_float32_adapters_over_any_base_give_its_dtype(dtype: torch.dtype) -> None:
    net, x = linear(), inputs().to(dtype)
    for name, values in net.named_parameters():
        values.data = values.to(dtype if "base_layer" in name else torch.float32) / 64  # which float16 holds
    found = mixed(net, x, NAMES)
    assert found.dtype == dtype
    # Half types round each layer's sums once, in float32: whole numbers over powers of two stay exact up to there.
    assert torch.equal(found, each_alone(net, x, NAMES))


def test_each_adapter_is_trained_by_its_own_rows_alone() -> None:
    net, x = linear(), inputs()
    names = ["a", BASE, "b", "a", BASE, BASE, "b"]
    mixed(net, x, names).square().sum().backward()
    found = {name: values.grad for name, values in net.named_parameters() if values.requires_grad}
    assert all(values is None for name, values in found.items() if ".c." in name)
    net.zero_grad()
    for name in "ab":
        alone(net, x[[row for row, one in enumerate(names) if one == name]], name).square().sum().backward()
    wanted = {name: values.grad for name, values in net.named_parameters() if values.requires_grad}
    assert all((found[name] is None and one is None) or torch.equal(found[name], one) for name, one in wanted.items())
    assert sum(one is not None for one in wanted.values()) == 8  # A and B of two adapters at two layers


def test_recomputed_activations_are_those_of_each_row_within_the_context() -> None:
    net, x = linear(), inputs().requires_grad_()
    with surgery.mixed_batch(net, NAMES):
        net(x).sum().backward()
        wanted = {name: values.grad for name, values in net.named_parameters() if values.grad is not None}
        net.zero_grad()
        torch.utils.checkpoint.checkpoint(net, x, use_reentrant=False).sum().backward()
    assert all(torch.equal(dict(net.named_parameters())[name].grad, one) for name, one in wanted.items())


def test_dropout_acts_in_training_alone() -> None:
    net, x = nn.Sequential(nn.Linear(4, 6)), inputs()
    surgery.inject(net, LoraConfig(**PLAIN, r=4, lora_dropout=0.5), adapter_name="a")
    whole_numbers(net)
    names = ["a", BASE] * 3 + ["a"]
    trained, evaluated = mixed(net.train(), x, names), mixed(net.eval(), x, names)
    assert torch.equal(evaluated, each_alone(net, x, names))
    assert torch.equal(trained[1::2], evaluated[1::2])
    assert not torch.equal(trained, evaluated)


def test_the_base_layer_runs_once_for_the_whole_batch() -> None:
    net, seen = linear(), []
    net[0].base_layer.register_forward_hook(lambda _layer, given, _out: seen.append(len(given[0])))
    mixed(net, inputs(), NAMES)
    assert seen == [ROWS]


def test_after_it_the_active_adapters_run_again_also_after_an_error() -> None:
    net, x = linear(), inputs()
    surgery.set_adapter(net, ["b", "a"])
    before = net(x)
    mixed(net, x, NAMES)
    assert torch.equal(net(x), before)
    with pytest.raises(ZeroDivisionError), surgery.mixed_batch(net, NAMES):
        raise ZeroDivisionError
    assert torch.equal(net(x), before)
    with pytest.raises(UsageError):
        mixed(net, x, NAMES[1:])
    assert torch.equal(net(x), before)
    surgery.eject(net)
    assert type(net[0]) is nn.Linear


@pytest.mark.parametrize("names", [NAMES[1:], [*NAMES, "a"], [BASE], ["a"] * 2], ids=str)
def test_a_number_of_names_unlike_the_batch_is_refused_at_the_first_layer(names: list[str]) -> None:
    with pytest.raises(UsageError, match=rf"0: {len(names)} adapter_names, and its input is \[7, 4\]"):
        mixed(linear(), inputs(), names)


@pytest.mark.parametrize(("names", "match"), [("a", "a list"), ([], "a list"), ((), "a list")])
def test_what_is_no_list_of_names_is_refused(names: list[str], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        mixed(linear(), inputs(), names)


def test_a_name_that_is_not_there_is_refused_with_those_that_are() -> None:
    with pytest.raises(StateError, match="adapter 'd' is not in the model; there are: a, b, c"):
        mixed(linear(), inputs(), [*NAMES[:-1], "d"])
    with pytest.raises(StateError, match="no adapters"):
        mixed(nn.Linear(4, 4), inputs(), NAMES)


def test_an_adapter_that_is_called_as_none_is_refused() -> None:
    with pytest.raises(UsageError, match="'__base__': modules have this word for something else"):
        surgery.inject(linear(), RULES["lora"](2), adapter_name=BASE)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [("linear", (4,)), ("convolution", (4, 4, 4)), ("linear", (2, 4)), ("linear", (1, 4))],
    ids=str,
)
def test_an_input_whose_rows_cannot_be_told_is_refused(layer: str, shape: tuple[int, ...]) -> None:
    net = three(nn.Sequential(LAYERS[layer][0]()))
    with pytest.raises(UsageError, match="one name for each row of the first axis is wanted"):
        mixed(net, torch.zeros(shape).double(), ["a", BASE, "b", "c"])


def test_merged_and_disabled_adapters_are_refused() -> None:
    net, x = linear(), inputs()
    with surgery.disable_adapters(net), pytest.raises(StateError, match="enable_adapters first"):
        mixed(net, x, NAMES)
    surgery.merge(net)
    with pytest.raises(StateError, match="cannot mix a batch while adapters are merged; unmerge first"):
        mixed(net, x, NAMES)
    surgery.unmerge(net)
    assert torch.equal(mixed(net, x, NAMES), each_alone(net, x, NAMES))


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "mix a batch": lambda net: surgery.mixed_batch(net, NAMES).__enter__(),
    "switch adapters": lambda net: surgery.set_adapter(net, "b"),
    "merge": surgery.merge,
    "add an adapter": lambda net: surgery.inject(net, RULES["lora"](2), adapter_name="d"),
    "eject": surgery.eject,
}


@pytest.mark.parametrize("what", CHANGES)
def test_while_a_batch_is_mixed_nothing_else_is_changed(what: str) -> None:
    net, x = linear(), inputs()
    with surgery.mixed_batch(net, NAMES):
        with pytest.raises(StateError, match=f"cannot {what}.* while a batch is mixed; leave mixed_batch first"):
            CHANGES[what](net)
        found = net(x)
    assert torch.equal(found, each_alone(net, x, NAMES))


@pytest.mark.parametrize("what", ["weight", "bias"])
def test_a_caller_that_reads_weights_is_refused(what: str) -> None:
    net = linear()
    with surgery.mixed_batch(net, NAMES), pytest.raises(StateError, match="0: its weight is read while a batch"):
        getattr(net[0], what)


def replaced(body: nn.Module) -> nn.Module:
    """A body that `a` and `b` replace, and `c` does not, beside a layer that all adapt."""
    net = nn.ModuleDict({"body": body, "other": nn.Linear(4, 6)})
    for name, saved in {"a": ["body"], "b": ["body"], "c": None}.items():
        config = LoraConfig(r=2, target_modules=["other"], modules_to_save=saved)
        surgery.inject(net, config, adapter_name=name)
    return whole_numbers(net)


@pytest.mark.parametrize("layer", LAYERS)
def test_each_row_runs_through_its_own_copy_of_a_replaced_module(layer: str) -> None:
    torch.manual_seed(0)
    net, x = replaced(LAYERS[layer][0]()), inputs(layer)
    with surgery.mixed_batch(net, NAMES):
        found = net["body"](x)
        assert torch.equal(net["body"](input=x) if layer != "conv1d" else net["body"](x=x), found)
        with pytest.raises(UsageError, match="body: 7 adapter_names, and its input is"):
            net["body"](x[:3])
        with pytest.raises(StateError, match="body: its weight is read while a batch is mixed"):
            _ = net["body"].weight
    rows = []
    for row, name in enumerate(NAMES):
        with surgery.set_adapter(net, [] if name == BASE else name):
            rows.append(net["body"](x[row : row + 1]))
    assert torch.equal(found, torch.cat(rows))
    with surgery.set_adapter(net, "a"):
        assert not torch.equal(found, net["body"](x))


def test_each_copy_of_a_replaced_module_is_trained_by_its_own_rows_alone() -> None:
    torch.manual_seed(0)
    net, x = replaced(nn.Linear(4, 6)), inputs()
    with surgery.mixed_batch(net, [*NAMES[:2], *[BASE] * 5]):
        net["body"](x).sum().backward()
    had = {name for name, values in net.named_parameters() if values.grad is not None}
    assert had == {"body.modules_to_save.a.weight", "body.modules_to_save.a.bias"}


def test_other_replaced_modules_are_refused_only_where_a_named_adapter_replaces_one() -> None:
    torch.manual_seed(0)
    net, x = replaced(nn.LayerNorm(4)), inputs()
    with pytest.raises(StateError, match=r"body: a copy stands in for this LayerNorm.*cannot run a there"):
        mixed(net, x, ["a", BASE, "c", "c", "c", "c", "c"])
    with surgery.mixed_batch(net, ["c", BASE, "c", "c", "c", "c", "c"]):
        found = net["body"](x)
    with surgery.set_adapter(net, "c"):
        assert torch.equal(found, net["body"](x))


def attention(batch_first: bool = True) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(4, 2, 8, batch_first=batch_first)


def test_attention_layers_of_torch_are_refused_where_a_named_adapter_lies() -> None:
    net = surgery.inject(attention(), LoraConfig(r=2, target_modules=["self_attn"]), adapter_name="a")
    surgery.inject(net, LoraConfig(r=2, target_modules=["linear2"]), adapter_name="b")
    with pytest.raises(StateError, match="self_attn: an attention layer"):
        mixed(net, torch.zeros(2, 3, 4), ["a", "b"])


@pytest.mark.parametrize("is_training", [True, False])
def test_the_fast_path_of_torch_is_refused_and_the_slow_one_runs(is_training: bool) -> None:
    torch.manual_seed(0)
    net = surgery.inject(attention(), LoraConfig(**PLAIN | {"target_modules": ["linear1"]}), adapter_name="a")
    net, x = net.train(is_training), torch.zeros(2, 3, 4)
    if is_training:
        assert mixed(net, x, ["a", BASE]).shape == x.shape
    else:
        with torch.no_grad(), pytest.raises(StateError, match="linear1: its weight is read"):
            mixed(net, x, ["a", BASE])


def test_a_model_whose_rows_may_be_the_second_axis_is_refused() -> None:
    net = surgery.inject(attention(batch_first=False), LoraConfig(r=2, target_modules=["linear1"]), adapter_name="a")
    with pytest.raises(StateError, match="self_attn: batch_first is False"):
        mixed(net, torch.zeros(2, 2, 4), ["a", BASE])


def test_adalora_in_training_is_refused() -> None:
    net, x = linear("adalora"), inputs()
    with pytest.raises(StateError, match="AdaLoRA in training"):
        mixed(net.train(), x, NAMES)
    assert mixed(net.eval(), x, NAMES).shape == (ROWS, 2)
