"""Training on a GPU: peft's outputs and gradients, autocast, checkpointing, torch.compile, Trainer, device maps."""

import copy
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import peft
import pytest
import test_load_model as loading
import test_trainer as trainers
import test_training as training
import torch
from device import DEVICE, held, there
from torch import Tensor, nn

import surgery

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
TOKENS = training.TOKENS
TARGETS = {"target_modules": ["q_proj", "down_proj"]}
CONFIGS: dict[str, Any] = {
    "lora": surgery.LoraConfig(r=4, lora_alpha=8, **TARGETS),
    "dropout": surgery.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.25, **TARGETS),
    "dora": surgery.LoraConfig(r=4, use_dora=True, **TARGETS),
    "ia3": surgery.IA3Config(feedforward_modules=["down_proj"], **TARGETS),
    "adalora": surgery.AdaLoraConfig(init_r=4, target_r=2, total_step=9, **TARGETS),
    "vera": surgery.VeraConfig(r=4, **TARGETS),
}
each_config = pytest.mark.parametrize("name", CONFIGS)


@pytest.fixture(autouse=True)
def _without_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def llama(dtype: torch.dtype = torch.float32) -> Any:
    return there(training.llama(dtype))


def injected(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """Of which each tensor has something to do."""
    model = surgery.inject(llama(dtype), CONFIGS[name])
    torch.manual_seed(1)
    with torch.no_grad():
        for values in model.parameters():
            if values.requires_grad:
                values.add_((torch.randn(values.shape) / 8).to(values.device, values.dtype))
    return model


def loss_of(model: nn.Module) -> Tensor:
    found: Tensor = model(input_ids=there(TOKENS), labels=there(TOKENS)).loss
    return found


def gradients(model: nn.Module) -> dict[str, Tensor]:
    torch.manual_seed(5)  # of the dropout
    model.zero_grad()
    loss_of(model.train()).backward()
    found = {name: values.grad.clone() for name, values in model.named_parameters() if values.grad is not None}
    return {name.removeprefix("base_model.model."): values for name, values in found.items()}


@each_dtype
@pytest.mark.parametrize("case", training.CASES)
def test_outputs_and_gradients_are_those_of_peft_to_the_bit(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, init_lora_weights=False, **training.CASES[case])
    theirs = peft.get_peft_model(llama(dtype), config)
    theirs.save_pretrained(tmp_path)
    ours = surgery.load(llama(dtype), tmp_path, trainable=True)
    with torch.no_grad():
        found, wanted = (model.eval()(there(TOKENS)).logits for model in (ours, theirs))
    assert torch.equal(found, wanted)
    assert training.all_equal(gradients(ours), gradients(theirs))


@each_config
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_a_step_under_autocast_trains_every_tensor(name: str, half: torch.dtype) -> None:
    model = injected(name).train()
    fitted = {key: values for key, values in model.named_parameters() if values.requires_grad}
    before = {key: values.detach().clone() for key, values in fitted.items()}
    optimizer = torch.optim.SGD(fitted.values(), lr=0.5)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=256.0, enabled=half == torch.float16)
    for _ in range(2):
        with torch.autocast(DEVICE, dtype=half):
            loss = loss_of(model)
        scaler.scale(loss).backward()
        assert all(values.grad.dtype == values.dtype == torch.float32 for values in fitted.values())
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert bool(loss.isfinite())
    assert not any(torch.equal(values, before[key]) for key, values in fitted.items())


@each_config
@pytest.mark.parametrize("reentrant", [False, True], ids=["saved tensors", "reentrant"])
def test_gradient_checkpointing_changes_no_bit_of_a_gradient(name: str, reentrant: bool) -> None:
    model = injected(name)
    wanted = gradients(model)
    assert training.all_equal(gradients(model), wanted)  # else nothing could be told
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert training.all_equal(gradients(model), wanted)


class Block(nn.Module):
    """Wide enough for the branch that is one step of autograd where nothing compiles it."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.down_proj = nn.Linear(256, 512), nn.Linear(512, 256)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(torch.tanh(self.q_proj(x)))
        return out


@each_config
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_compiled_model_in_one_graph_gives_the_outputs_and_gradients_of_an_eager_one(
    name: str, dtype: torch.dtype
) -> None:
    if name == "dropout":
        return  # of which a compiled graph draws others
    torch.manual_seed(0)
    model = there(surgery.inject(Block().to(dtype), CONFIGS[name]))
    with torch.no_grad():
        for values in model.parameters():
            if values.requires_grad:
                values.add_(torch.randn_like(values) / 16)
    x = there(torch.randn(512, 256, dtype=dtype))
    fitted = [values for values in model.parameters() if values.requires_grad]
    found = []
    for run in (model, torch.compile(model, fullgraph=True)):
        out = run(x)
        found.append([out.detach(), *torch.autograd.grad(out.float().square().mean(), fitted)])
    for eager, compiled in zip(*found, strict=True):
        assert eager.dtype == compiled.dtype
        # Sums of up to 512 terms, twice, in float32; and some 8 roundings to the dtype.
        room = 2 * 512**0.5 * torch.finfo(torch.float32).eps + 8 * torch.finfo(dtype).eps
        assert float((eager.double() - compiled.double()).abs().max()) <= room * float(eager.abs().max())
    torch._dynamo.reset()


@each_config
@pytest.mark.parametrize("kind", [None, "nf4"])  # the kernel of 8 bits asks for outliers itself
def test_no_forward_or_backward_waits_for_the_device(kind: str | None, name: str) -> None:
    """Whatever asks a GPU for a number stops all that could be queued meanwhile."""
    model = there(Block().bfloat16())
    model = surgery.quantize(model, kind) if kind else model
    surgery.inject(model, CONFIGS[name])
    x = there(torch.randn(8, 256, dtype=torch.bfloat16))
    model(x).sum().backward()  # what is made once is made now
    if DEVICE == "cpu":
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(x).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_compiled_model_is_not_compiled_anew_for_another_batch_of_the_same_shape() -> None:
    model = there(surgery.inject(Block(), CONFIGS["lora"]))
    counted = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counted)
    for _ in range(3):
        compiled(there(torch.randn(8, 256))).sum().backward()
    assert counted.frame_count == 1
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("options", "run_options"),
    [
        ({}, {}),
        ({"use_dora": True, "lora_dropout": 0.0}, {}),
        ({}, {"bf16": True}),
        ({}, {"gradient_accumulation_steps": 2, "gradient_checkpointing": True}),
    ],
    ids=["plain", "dora", "bf16", "checkpointing"],
)
def test_a_resumed_run_of_trainer_has_the_losses_of_the_uninterrupted_one(
    options: dict[str, Any], run_options: dict[str, Any], tmp_path: Path
) -> None:
    run_options = {"use_cpu": DEVICE == "cpu", **run_options}
    whole = trainers.injected(**options)
    uninterrupted = trainers.trainer(whole, tmp_path / "whole", **run_options)
    uninterrupted.train()
    model = trainers.injected(**options)
    resumed = trainers.trainer(model, tmp_path / "resumed", **run_options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{trainers.CUT}"))
    assert {values.device.type for values in model.parameters()} == {DEVICE}
    wanted = trainers.losses(uninterrupted)
    assert len(set(wanted.values())) == trainers.STEPS
    assert trainers.losses(resumed) == wanted
    assert trainers.equal(trainers.adapter(model), trainers.adapter(whole))


@pytest.mark.parametrize("device_map", ["auto", DEVICE, {"": DEVICE}], ids=str)
@pytest.mark.parametrize("quantization", [None, "nf4", "int8"])
def test_a_model_is_loaded_onto_the_device_with_its_adapter(
    device_map: Any, quantization: str | None, tmp_path: Path
) -> None:
    loading.base(tmp_path / "base", torch.bfloat16)
    base = trainers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    loading.trained(base, tmp_path / "adapter", loading.CONFIG, base_model_name_or_path=str(tmp_path / "base"))
    model = surgery.load_model(tmp_path / "adapter", device_map=device_map, quantization=quantization)
    assert {values.device.type for values in model.parameters()} == {DEVICE}
    with torch.no_grad():
        out = model.eval()(there(TOKENS)).logits
    if quantization is None:
        with torch.no_grad():
            assert torch.equal(out, there(base).eval()(there(TOKENS)).logits)
    before = held(model)
    surgery.merge(model, **({"into": "16bit"} if quantization else {}))
    assert held(model) != before
    assert held(surgery.unmerge(model)) == before
    assert bool(out.isfinite().all())


@pytest.mark.parametrize("autocast", [False, True])
def test_generation_under_mixed_adapters_is_that_of_each_alone(autocast: bool) -> None:
    model = injected("lora")
    model.add_adapter(CONFIGS["dora"], "b")
    alone, tokens = {}, there(TOKENS)
    names = ["b", "default"]
    with torch.autocast(DEVICE, torch.bfloat16) if autocast else nullcontext():
        for name in names:
            model.set_adapter(name)
            alone[name] = model.generate(tokens, max_new_tokens=4, do_sample=False)
        mixed = model.generate(tokens, adapter_names=names, max_new_tokens=4, do_sample=False)
    assert all(torch.equal(mixed[row], alone[name][row]) for row, name in enumerate(names))


def test_a_deep_copy_there_is_trained_alone() -> None:
    model = injected("lora")
    twin, before = copy.deepcopy(model), held(model)
    optimizer = torch.optim.AdamW([values for values in twin.parameters() if values.requires_grad], lr=0.1)
    loss_of(twin).backward()
    optimizer.step()
    assert held(model) == before
    assert held(twin) != before
