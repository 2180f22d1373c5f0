"""What torch does with models, it does with one that has adapters; of each kind of adapter."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgery

X = torch.linspace(-1, 1, 24).view(4, 6)
TARGETS = {"target_modules": ["0", "2"]}
KINDS: dict[str, Any] = {
    "lora": lambda: surgery.LoraConfig(r=2, init_lora_weights=False, **TARGETS),
    "dora": lambda: surgery.LoraConfig(r=2, init_lora_weights=False, use_dora=True, **TARGETS),
    "ia3": lambda: surgery.IA3Config(init_ia3_weights=False, feedforward_modules=["2"], **TARGETS),
    "adalora": lambda: surgery.AdaLoraConfig(init_r=2, target_r=1, total_step=9, init_lora_weights=False, **TARGETS),
    "miss": lambda: surgery.MissConfig(r=4, init_weights=False, **TARGETS),
    "loha": lambda: surgery.LoHaConfig(r=2, init_weights=False, **TARGETS),
    "lokr": lambda: surgery.LoKrConfig(r=1, init_weights=False, **TARGETS),
    "shira": lambda: surgery.ShiraConfig(r=2, init_weights=False, **TARGETS),
    "supertuning": lambda: surgery.SupertuningConfig(sparsity=0.5, r=2, init_weights=False, **TARGETS),
    "c3a": lambda: surgery.C3AConfig(block_size=2, **TARGETS),
    "vblora": lambda: surgery.VBLoRAConfig(r=2, num_vectors=5, vector_length=2, **TARGETS),
    "unilora": lambda: surgery.UniLoraConfig(r=2, theta_d_length=9, **TARGETS),
    "tinylora": lambda: surgery.TinyLoraConfig(u=5, init_weights="uniform", **TARGETS),
    "fourierft": lambda: surgery.FourierFTConfig(n_frequency=20, scaling=6, **TARGETS),
    "waveft": lambda: surgery.WaveFTConfig(n_frequency=20, scaling=100, init_weights=False, **TARGETS),
    "hira": lambda: surgery.HiraConfig(r=2, init_weights=False, **TARGETS),
    "delora": lambda: surgery.DeloraConfig(r=2, init_weights=False, **TARGETS),
    "glora": lambda: surgery.GloraConfig(r=2, init_weights=False, **TARGETS),
    "gralora": lambda: surgery.GraloraConfig(r=2, hybrid_r=1, init_weights=False, **TARGETS),
}
FROM_WEIGHTS = {"dora", "delora", "supertuning", "tinylora"}  # which start from them
UNWATCHED = {"loha", "fourierft", "glora"}  # which add their delta to a weight that nothing watches
each_kind = pytest.mark.parametrize("kind", KINDS)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 6))


def injected(kind: str) -> nn.Sequential:
    model = net()
    torch.manual_seed(1)
    return surgery.inject(model, KINDS[kind]())


def gradients(model: nn.Module, call: Any) -> list[Tensor]:
    trained = [values for values in model.parameters() if values.requires_grad]
    out = call(X)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), trained)]


@each_kind
def test_it_is_compiled_in_one_piece_and_trained_so(kind: str) -> None:
    torch._dynamo.reset()  # it counts how often a forward is compiled, by whatever test
    model = injected(kind)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for found, wanted in zip(gradients(model, compiled), gradients(model, model), strict=True):
        # Sums of at most 24 terms, through two layers and back, in another order; some of them cancel.
        atol = 4 * 24 * torch.finfo(torch.float32).eps * float(wanted.abs().max())
        torch.testing.assert_close(found, wanted, rtol=0, atol=atol)


@each_kind
def test_it_is_exported_as_it_runs(kind: str) -> None:
    model = injected(kind).eval()
    program = torch.export.export(model, (X,))
    torch.testing.assert_close(program.module()(X), model(X))
    assert program.state_dict.keys() == model.state_dict().keys()


@each_kind
def test_a_copy_and_a_state_dict_say_the_same(kind: str) -> None:
    model = injected(kind)
    twin, other = copy.deepcopy(model), surgery.inject(net(), KINDS[kind]())
    other.load_state_dict(model.state_dict())
    for one in (twin, other):
        assert torch.equal(one(X), model(X))
    surgery.eject(twin)
    assert torch.equal(twin(X), net()(X))
    assert not torch.equal(model(X), twin(X))


@each_kind
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_it_goes_to_another_dtype_and_is_merged_there(kind: str, dtype: torch.dtype) -> None:
    model = injected(kind).to("cpu", dtype)
    assert {values.dtype for values in model.parameters()} == {dtype}
    before = {name: values.clone() for name, values in model.state_dict().items()}
    out = model(X.to(dtype))
    assert out.dtype == dtype
    merged = surgery.merge(model)(X.to(dtype))
    # Sums of at most 8 + 2 terms below 8, in two layers; a merge rounds factors to 22 bits.
    unit = max(torch.finfo(dtype).eps, 2.0**-21)
    torch.testing.assert_close(merged, out, rtol=0, atol=2 * 8 * 10 * unit)
    surgery.unmerge(model)
    assert all(torch.equal(values, before[name]) for name, values in model.state_dict().items())


@pytest.mark.parametrize("kind", [one for one in KINDS if one not in FROM_WEIGHTS])
def test_one_that_was_made_on_the_meta_device_takes_its_weights_later(kind: str) -> None:
    wanted = injected(kind)
    with torch.device("meta"):
        model = net()
        surgery.inject(model, KINDS[kind]())
    assert all(values.is_meta for values in model.parameters())
    model.load_state_dict(wanted.state_dict(), assign=True)
    assert torch.equal(model(X), wanted(X))
    model.to_empty(device="cpu").load_state_dict(wanted.state_dict())
    assert torch.equal(model(X), wanted(X))


@each_kind
def test_it_runs_in_inference_mode_and_is_trained_afterwards(kind: str) -> None:
    model = injected(kind)
    with torch.inference_mode():
        out = model(X)
    assert out.is_inference()
    assert torch.equal(model(X), out)
    assert all(values.isfinite().all() for values in gradients(model, model))


@each_kind
def test_hooks_on_a_layer_and_on_its_base_run_and_may_change_what_they_see(kind: str) -> None:
    model = injected(kind)
    alone, seen = model(X), []
    handles = [
        model[0].register_forward_hook(lambda *_: seen.append("adapted")),
        model[0].base_layer.register_forward_hook(lambda *_: seen.append("base")),
        model[0].base_layer.register_full_backward_hook(lambda *_: seen.append("backward")),
    ]
    model(X.clone().requires_grad_()).sum().backward()
    assert seen == ["base", "adapted", "backward"]
    watched = model(X)
    # Sums of at most 8 + 1 terms in two layers, rounded anew.
    room = 2 * 2 * 9 * torch.finfo(torch.float32).eps * float(alone.abs().max()) if kind in UNWATCHED else 0
    torch.testing.assert_close(watched, alone, rtol=0, atol=room)
    handles.append(model[2].register_forward_hook(lambda _module, _given, out: 2 * out))
    assert torch.equal(model(X), 2 * watched)
    for handle in handles:
        handle.remove()
    assert torch.equal(model(X), alone)
