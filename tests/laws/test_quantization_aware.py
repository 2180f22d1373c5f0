"""What a quantization-aware adapter runs as is what its merge is, held in the format: every method, every format."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from rational import same_bits
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

import surgery
from surgery.codecs import FORMS
from surgery.core.arithmetic import float_product
from surgery.layers.running import effective
from surgery.methods import METHODS
from surgery.procedures.planning.treatment import LIVE_FORMS

IN, OUT = 128, 192
WHOLE = ("w4a16", "w4a16-asym", "w8a16", "nvfp4", "mxfp4a16")  # which hold whole groups of inputs alone
OTHERS = {"mxfp4": "mxfp4a16", "fp8": "fp8_dynamic", "gptq": "w4a16", "awq": "w4a16"}
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "LORA": [
        {"r": 4, "lora_alpha": 6},
        {"r": 4, "use_dora": True},
        {"r": 4, "lora_bias": True},
        {"r": 4, "use_qalora": True, "qalora_group_size": 16},
        {"r": 4, "use_bdlora": {"target_modules_bd_a": ["0"], "nblocks": 2}},
        {"r": 4, "init_lora_weights": "pissa"},
    ],
    "IA3": [{"feedforward_modules": []}, {"feedforward_modules": ["0"]}],
    "ADALORA": [{"init_r": 4, "target_r": 2, "total_step": 9}],
    "VERA": [{"r": 4}],
    "LOHA": [{"r": 4, "alpha": 6}],
    "HRA": [{"r": 4}, {"r": 3, "apply_GS": True}],
    "OFT": [{"oft_block_size": 16}, {"oft_block_size": 16, "use_cayley_neumann": False}],
    "ROAD": [{"group_size": 16, "variant": "road_2"}],
    "BOFT": [{"boft_block_size": 16}, {"boft_block_size": 16, "boft_n_butterfly_factor": 3}],
    "TRAINABLE_TOKENS": [{"token_indices": [7, 0]}],
    "PVERA": [{"r": 4}],
    "MISS": [{"r": 4}, {"r": 5, "init_weights": "mini", "mini_r": 4}],
    "HIRA": [{"r": 4}],
    "LOKR": [{"r": 4, "alpha": 6}, {"r": 16, "decompose_factor": 4}],
    "RANDLORA": [{"r": 32}],
    "DELORA": [{"r": 4}],
    "SHIRA": [{"r": 8}],
    "SUPERTUNING": [{"sparsity": 0.9, "r": 4}],
    "C3A": [{"block_size": 16}],
    "TINYLORA": [{"u": 5}],
    "UNILORA": [{"theta_d_length": 40}],
    "VBLORA": [{"r": 4, "num_vectors": 9, "vector_length": 16}],
    "FOURIERFT": [{"n_frequency": 300}],
    "WAVEFT": [{"n_frequency": 300}],
    "GRALORA": [{"r": 8, "gralora_k": 4, "hybrid_r": 2}],
    "BEFT": [{}],
    "GLORA": [{"r": 4}, {"config_A_B": "vector", "config_C": "vector", "config_D_E": "vector"}],
}
PLAIN, OTHER = (METHODS[name](target_modules=["0"], **SETTINGS[name][0]) for name in ("LORA", "IA3"))
SITED = [name for name, config in METHODS.items() if not config.copied]
CASES = [METHODS[name](target_modules=["0"], **one) for name in SITED for one in SETTINGS[name]]
each_case = pytest.mark.parametrize("config", CASES, ids=range(len(CASES)))
each_format = pytest.mark.parametrize("form", FORMS)
# Each config in each format; the dtypes in turns, so that each goes with every config and every format. The rest is for
# `make test-all`.
each_cell = pytest.mark.parametrize(
    ("config", "form", "dtype"),
    [
        pytest.param(config, form, dtype, id=f"{i}-{form}-{dtype}", marks=[pytest.mark.slow] if (i + j + k) % 2 else [])
        for i, config in enumerate(CASES)
        for j, form in enumerate(FORMS)
        for k, dtype in enumerate((torch.float32, torch.bfloat16))
    ],
)


def net(dtype: torch.dtype = torch.float32, layer: type[nn.Module] = nn.Linear) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(layer(IN, OUT)).to(dtype)


class Narrow(nn.Linear):
    """Of inputs that are no whole group."""

    def __init__(self, _: int, outputs: int) -> None:
        super().__init__(120, outputs)


def trained(model: Any) -> Any:
    torch.manual_seed(1)
    with torch.no_grad():
        for values in model.parameters():
            if values.requires_grad:
                values.add_(torch.randn_like(values) * 0.05)
    return model


def given(dtype: torch.dtype = torch.float32) -> Tensor:
    torch.manual_seed(2)
    return torch.randn(5, IN, dtype=dtype)


def held(weight: Tensor, form: str) -> Tensor:
    """A plain weight through the format and back."""
    codec, settings = FORMS[form]
    return codec.decode(codec.fresh(weight.detach(), settings), weight.dtype)


@each_cell
def test_it_runs_to_the_bit_as_its_merge_held_in_the_format(config: Any, form: str, dtype: torch.dtype) -> None:
    aware = trained(surgery.inject(net(dtype), config, quantization_aware=form))
    plain = trained(surgery.inject(net(dtype), config))
    merged = surgery.eject(surgery.merge(copy.deepcopy(plain)), keep_merged=True)[0]
    wanted, x = held(merged.weight, form), given(dtype)
    assert same_bits(aware[0].weight.detach(), wanted)
    assert same_bits(aware[0].bias.detach(), merged.bias.detach())
    assert same_bits(aware(x).detach(), F.linear(x, wanted, merged.bias).detach())
    with torch.no_grad():
        assert same_bits(aware(x), F.linear(x, wanted, merged.bias))
    same = torch.equal(wanted, held(net(dtype)[0].weight, form))
    assert same == config.method("0").leaves_weight  # else the law could not fail
    assert not torch.equal(aware(x), plain(x))


@each_case
@each_format
def test_the_gradient_is_that_of_the_unheld_weight_at_the_held_one(config: Any, form: str) -> None:
    aware = trained(surgery.inject(net(), config, quantization_aware=form))
    plain, x = trained(surgery.inject(net(), config)), given()
    aware(x).square().sum().backward()
    weight, bias = (one.detach().requires_grad_() for one in (aware[0].weight, aware[0].bias))
    F.linear(x, weight, bias).square().sum().backward()
    laid = effective(plain[0].dense(), plain[0].running, plain[0].site, float_product)  # both at once, as sums go
    unheld = [(one, gradient.to(one.dtype)) for one, gradient in zip(laid, (weight.grad, bias.grad), strict=True)]
    torch.autograd.backward(*zip(*(pair for pair in unheld if pair[0].grad_fn is not None), strict=True))
    for found, wanted in zip(_fitted(aware), _fitted(plain), strict=True):
        assert found.grad is not None
        assert bool(found.grad.any())
        assert same_bits(found.grad, wanted.grad)


def _fitted(model: nn.Module) -> list[nn.Parameter]:
    return [values for values in model.parameters() if values.requires_grad]


@each_format
def test_several_adapters_are_held_as_their_merge_together(form: str) -> None:
    def made(aware: str | None) -> Any:
        model = surgery.inject(net(), PLAIN, quantization_aware=aware)
        surgery.inject(model, OTHER, adapter_name="b")
        surgery.set_adapter(model, ["default", "b"])
        return trained(model)

    model, merged = made(form), surgery.eject(surgery.merge(made(None)), keep_merged=True)[0]
    assert same_bits(model[0].weight.detach(), held(merged.weight, form))
    surgery.set_adapter(model, "b")  # alone it is aware of nothing
    assert same_bits(model(given()).detach(), _alone(made(None))(given()).detach())
    with surgery.disable_adapters(model):
        assert same_bits(model(given()).detach(), net()(given()).detach())


def _alone(model: Any) -> Any:
    surgery.set_adapter(model, "b")
    return model


@each_format
@pytest.mark.parametrize("loaded", [False, True])
def test_it_is_told_at_once_where_no_merge_in_memory_holds_the_format(
    form: str, loaded: bool, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    surgery.save(surgery.inject(net(), PLAIN), tmp_path)
    if loaded:
        model = surgery.load(net(), tmp_path, quantization_aware=form)
    else:
        model = surgery.inject(net(), PLAIN, quantization_aware=form)
    told = [str(one.message) for one in recwarn if one.filename == __file__]
    assert len(told) == (form not in LIVE_FORMS)
    if told:
        step = "no merge writes it" if form == "w4a16-asym" else f"surgery merge --into {form}, of the saved adapter"
        assert told[0].startswith(f"quantization_aware is '{form}'")
        assert step in told[0]
        with pytest.raises(surgery.UsageError, match=r"no layer in memory holds|loads no packed zero points"):
            surgery.merge(model, into=form)


def test_what_cannot_be_aware_is_refused_by_name_and_nothing_changes() -> None:
    def refused(model: nn.Module, error: type[Exception], told: str, form: str = "nf4", **fields: Any) -> None:
        before = list(model.modules())
        config = surgery.LoraConfig(**({"target_modules": ["0"]} | fields))
        with pytest.raises(error, match=told):
            surgery.inject(model, config, adapter_name="new", quantization_aware=form)
        assert list(model.modules()) == before

    refused(net(), surgery.UsageError, f"'nf5'; one of {', '.join(FORMS)} is wanted", form="nf5")
    for form, step in OTHERS.items():
        refused(net(), surgery.UsageError, f"quantization_aware: '{form}': .*; give {step}", form=form)
    for form in WHOLE:
        refused(net(layer=Narrow), surgery.MatchError, r"^0: .*\[192, 120\].* or exclude it", form=form)
    refused(net(), surgery.ConfigError, r"lora_dropout is 0\.1", lora_dropout=0.1)
    for name in ("rank_dropout", "module_dropout"):
        loha = surgery.LoHaConfig(target_modules=["0"], **{name: 0.1})
        with pytest.raises(surgery.ConfigError, match=rf"{name} is 0\.1"):
            surgery.inject(net(), loha, quantization_aware="nf4")
    refused(net(layer=Conv1D), surgery.MatchError, "0: its op is conv1d; quantization_aware is for Linear")
    refused(net(torch.float64), surgery.MatchError, "0: 4-bit: nf4 .* from float64")
    model = surgery.inject(net(), PLAIN, quantization_aware="nf4")
    refused(model, surgery.StateError, "aware of another format", form="int8")
    mixing = surgery.mixed_batch(model, ["default", "__base__"] * 2)
    with pytest.raises(surgery.StateError, match="its weight is read while a batch is mixed"), mixing:
        model(torch.randn(4, IN))


def test_training_moves_it_and_the_loss_of_what_is_held_falls() -> None:
    torch.manual_seed(0)
    target, x = torch.randn(OUT, IN) / 8, torch.randn(256, IN)
    model = surgery.inject(net(), surgery.LoraConfig(r=8, target_modules=["0"]), quantization_aware="nf4")
    optimizer = torch.optim.Adam(_fitted(model), lr=1e-2)
    losses = []
    for _ in range(60):
        loss = F.mse_loss(model(x), F.linear(x, target))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]


@each_format
def test_a_saved_adapter_is_loaded_aware_of_the_format(form: str, tmp_path: Path) -> None:
    surgery.save(trained(surgery.inject(net(), PLAIN)), tmp_path / "adapter")
    wanted = trained(surgery.inject(net(), PLAIN, quantization_aware=form))
    found = surgery.load(net(), tmp_path / "adapter", quantization_aware=form)
    assert same_bits(found(given()), wanted(given()))
    with pytest.raises(surgery.UsageError, match="quantization_aware"):
        surgery.load(net(), tmp_path / "adapter", quantization_aware="nf5")
