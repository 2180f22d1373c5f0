"""CorDA and LoRA-GA: the parts of a weight that peft starts with, found from the same examples, over a base that stays.

That a start changes no output, and that files are plain LoRA for either side, stands in test_lora_table.
"""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from corda_of_peft import CordaConfig, preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

import surgery
from surgery.errors import ConfigError, MatchError, StateError, UsageError, ValueRangeError
from surgery.procedures.live import fresh
from surgery.testing import assert_equivalent

EPS = torch.finfo(torch.float32).eps
R, ALPHA, BATCHES = 3, 6, 4
FIELDS: dict[str, Any] = {"r": R, "lora_alpha": ALPHA, "target_modules": ["0", "2"]}


def made(last: Callable[[], nn.Module] = lambda: nn.Linear(12, 8)) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 12), nn.Tanh(), last()).eval()


def batches(rows: int = 40) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(rows, 16, generator=generator) for _ in range(BATCHES)]


def loss(outcome: Tensor, batch: Tensor) -> Tensor:
    return (outcome - batch[:, :8]).square().mean()


def started(start: str, model: nn.Module | None = None, **fields: Any) -> Any:
    config = surgery.LoraConfig(**FIELDS | {"init_lora_weights": start} | fields)
    of_gradients = {"loss": loss} if start == "lora_ga" else {}
    return surgery.inject(model or made(), config, examples=batches(), **of_gradients)


def by_peft(model: nn.Module, start: str, **fields: Any) -> Any:
    config = peft.LoraConfig(**FIELDS | {"init_lora_weights": start} | fields)
    if start == "corda":
        preprocess_corda(model, config, lambda: [model(one) for one in batches()])
    else:
        preprocess_loraga(model, config, lambda: [loss(model(one), one).backward() for one in batches()])
    return peft.get_peft_model(model, config)


def factors(layer: Any) -> tuple[Tensor, Tensor]:
    return layer.lora_A.default.weight.detach(), layer.lora_B.default.weight.detach()


@pytest.mark.parametrize("last", [lambda: nn.Linear(12, 8), lambda: Conv1D(8, 12)], ids=["Linear", "Conv1D"])
@pytest.mark.parametrize("half", [False, True], ids=["", "in the dtype of inputs"])
@pytest.mark.parametrize("method", ["ipm", "kpm"])
def test_corda_starts_with_what_peft_finds(method: str, half: bool, last: Any) -> None:
    settings = {"corda_method": method, "use_float16_for_covariance": half}
    theirs = by_peft(made(last), "corda", corda_config=CordaConfig(**settings), fan_in_fan_out=False)
    ours = started("corda", made(last), corda_config=settings)
    for name in (0, 2):
        (A, B), (wanted, very) = factors(ours[name]), factors(theirs.base_model.model[name])
        assert torch.equal(B, very)
        # There all rows are multiplied by the inverse at once: sums of as many terms as there are inputs.
        atol = A.shape[1] * EPS * condition(name) * float(wanted.abs().max())
        torch.testing.assert_close(A, wanted, rtol=0.0, atol=atol)


def condition(name: int) -> float:
    """Of the covariance that is inverted."""
    seen = [made()[:name](one).detach() for one in batches()]
    C = sum((one.T @ one / one.max() ** 2 for one in seen), torch.zeros(())) / BATCHES
    return float(torch.linalg.cond(C + 0.01 * C.diagonal().mean() * torch.eye(len(C))))


def turned(gradient: Tensor, most: int) -> float:
    """How far rounding may turn one of the first singular directions: by its error over their distances."""
    S = torch.linalg.svdvals(gradient.double())
    apart = (S[:-1] - S[1:])[: most + 1].min() if len(S) > 1 else S[0]
    return float(BATCHES * max(gradient.shape) * EPS * S[0] / apart)


def gradients() -> dict[int, Tensor]:
    model = made()
    for one in batches():
        loss(model(one), one).backward()
    return {name: model[name].weight.grad / BATCHES for name in (0, 2)}


@pytest.mark.parametrize("scale", ["stable", "weight_svd", "gd_scale", "unit"])
@pytest.mark.parametrize("direction", ["ArBr", "A2rBr", "ArB2r"])
def test_lora_ga_starts_along_the_parts_of_the_gradient_that_peft_takes(direction: str, scale: str) -> None:
    settings = {"direction": direction, "scale": scale, "stable_gamma": 9}
    theirs = by_peft(made(), "lora_ga", lora_ga_config=peft.LoraGAConfig(**settings))
    ours = started("lora_ga", lora_ga_config=settings)
    for name, gradient in gradients().items():
        atol = turned(gradient, 2 * R)
        A, B = factors(theirs.base_model.model[name])
        if scale == "weight_svd":  # peft's own largest singular value is a rough one
            B *= torch.linalg.matrix_norm(made()[name].weight.detach(), 2) / B[:, 0].norm()
        for mine, wanted, axis in zip(factors(ours[name]), (A, B), (1, 0), strict=True):
            # Each row of A and column of B is a direction, which may point either way.
            way = (mine * wanted).sum(axis, keepdim=True).sign()
            torch.testing.assert_close(way * mine, wanted, rtol=0.0, atol=atol * float(wanted.norm(dim=axis).max()))


def test_lora_ga_at_random_takes_some_of_the_first_parts_for_both() -> None:
    ours = started("lora_ga", lora_ga_config={"direction": "random", "scale": "unit"})
    for name, gradient in gradients().items():
        A, B = factors(ours[name])
        S = torch.linalg.svdvals(gradient)
        # Each pair is a part of the gradient itself: B = G A'.
        atol = turned(gradient, 2 * R) * float(S[0])
        torch.testing.assert_close(gradient @ A.T, B, rtol=0.0, atol=atol)
        assert B.norm(dim=0).min() > S[2 * R]


def test_lora_ga_over_conv1d_goes_by_its_outputs() -> None:
    theirs = by_peft(
        made(lambda: Conv1D(8, 12)), "lora_ga", lora_ga_config=peft.LoraGAConfig(scale="unit"), fan_in_fan_out=True
    )
    plain = made(lambda: Conv1D(8, 12))
    fields = {"target_modules": ["2"], "lora_ga_config": {"scale": "stable"}}
    A, B = factors(started("lora_ga", plain, **fields)[2])
    _, wanted = factors(theirs.base_model.model[2])
    torch.testing.assert_close(B.norm(dim=0), wanted.norm(dim=0) * 8**0.25 / 4, rtol=BATCHES * 12 * R * EPS, atol=0.0)
    assert A.shape == (R, 12)


def llama() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes)).eval()


def tokens() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    found = [torch.randint(0, 32, (2, 9), generator=generator) for _ in range(BATCHES)]
    return [{"input_ids": one, "attention_mask": torch.ones_like(one), "labels": one} for one in found]


@pytest.mark.parametrize("start", ["corda", "lora_ga"])
def test_a_model_of_transformers_gives_its_own_loss_and_its_files_run_in_peft(start: str, tmp_path: Path) -> None:
    fields = {"r": 2, "target_modules": "all-linear", "init_lora_weights": start}
    ours, given = surgery.inject(llama(), surgery.LoraConfig(**fields), examples=tokens()), tokens()[0]["input_ids"]
    assert torch.equal(ours(given).logits, llama()(given).logits)
    for name, values in ours.named_parameters():
        if "lora_B" in name:
            values.data.mul_(1.5)
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path).eval()
    assert_equivalent(ours, theirs, given, base=llama())


@pytest.mark.parametrize("start", ["corda", "lora_ga"])
def test_layers_are_seen_a_few_at_a_time_and_start_alike(start: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(3)
    wanted = started(start).state_dict()
    monkeypatch.setattr(fresh, "MOST_BYTES", 1)
    torch.manual_seed(3)
    found = started(start).state_dict()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    with pytest.raises(UsageError, match="an iterator runs once, and 2 rounds are needed"):
        surgery.inject(
            made(), surgery.LoraConfig(**FIELDS, init_lora_weights=start), examples=iter(batches()), adapter_name="b"
        )


@pytest.mark.parametrize("start", ["corda", "lora_ga"])
def test_examples_run_through_the_base_alone_and_leave_no_trace(start: str) -> None:
    model = made()
    torch.manual_seed(0)  # the randomized SVD of LoRA-GA draws
    wanted = started(start, copy.deepcopy(model))
    model[0].bias.requires_grad_(False)
    surgery.inject(model, surgery.LoraConfig(**FIELDS | {"init_lora_weights": False}), adapter_name="other")
    model.train()
    required = {name: one.requires_grad for name, one in model.named_parameters()}
    torch.manual_seed(0)
    config = surgery.LoraConfig(**FIELDS, init_lora_weights=start)
    with pytest.raises(ZeroDivisionError):
        surgery.inject(model, config, adapter_name="new", examples=(one / (1 // 0) for one in batches()))
    more = {"loss": loss} if start == "lora_ga" else {}
    surgery.inject(model, config, adapter_name="new", examples=batches(), **more)
    assert {name: one.requires_grad for name, one in model.named_parameters() if name in required} == required
    assert all(one.grad is None for one in model.parameters())
    assert model.training
    for layer in (0, 2):
        for mine, one in zip("AB", factors(wanted[layer]), strict=True):
            held = getattr(model[layer], f"lora_{mine}").new.weight
            assert held.shape == one.shape
            assert torch.equal(held, one)
    assert surgery.eject(model)[0].weight.requires_grad


def test_corda_starts_over_a_quantized_base_and_lora_ga_cannot() -> None:
    torch.manual_seed(0)
    model = surgery.quantize(nn.Sequential(nn.Linear(64, 64)), "nf4")
    x = torch.randn(80, 64)
    before = model(x).detach()
    fields = {"r": 2, "target_modules": ["0"]}
    with pytest.raises(StateError, match="0: its weight is quantized, which has no gradient"):
        surgery.inject(
            model,
            surgery.LoraConfig(**fields, init_lora_weights="lora_ga"),
            examples=[x],
            loss=lambda outcome, _: outcome.sum(),
        )
    ours = surgery.inject(model, surgery.LoraConfig(**fields, init_lora_weights="corda"), examples=[x])
    with torch.no_grad():
        assert_equivalent(lambda _given: before, ours, x)


def test_lora_ga_says_where_nothing_has_a_gradient() -> None:
    model, seen = made(), batches()
    with torch.inference_mode(), pytest.raises(StateError, match=r"torch\.inference_mode is on.* call inject outside"):
        surgery.inject(model, surgery.LoraConfig(**FIELDS, init_lora_weights="lora_ga"), examples=seen, loss=loss)
    assert all(one.requires_grad for one in model.parameters())
    assert "lora_A" not in str(started("lora_ga", model)[1])


@pytest.mark.parametrize("start", ["corda", "lora_ga"])
def test_a_file_that_would_change_the_base_again_is_refused_and_its_conversion_is_read(
    start: str, tmp_path: Path
) -> None:
    settings = {"corda_config": CordaConfig()} if start == "corda" else {"lora_ga_config": peft.LoraGAConfig()}
    theirs = by_peft(made(), start, **settings).eval()
    theirs.save_pretrained(tmp_path / "began")
    for name, values in theirs.named_parameters():
        if "lora_" in name:
            values.data.mul_(1.5)
    theirs.save_pretrained(tmp_path / "theirs")
    said = f"init_lora_weights is '{start}', by which PEFT changes .* path_initial_model_for_weight_conversion"
    with pytest.raises(surgery.FormatError, match=said):
        surgery.load(made(), tmp_path / "theirs")
    theirs.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=tmp_path / "began")
    told = json.loads((tmp_path / "converted" / "adapter_config.json").read_text())
    assert told[f"{start}_config"] is not None
    if start == "corda":
        told["corda_config"]["cache_file"] = "made.pt"
        (tmp_path / "converted" / "adapter_config.json").write_text(json.dumps(told))
    assert_equivalent(surgery.load(made(), tmp_path / "converted"), theirs, batches()[0], base=made())


def zero(outcome: Tensor, batch: Tensor) -> Tensor:
    return loss(outcome, batch) / outcome.sum().mul(0)


GA: dict[str, Any] = {"init_lora_weights": "lora_ga"}
CORDA: dict[str, Any] = {"init_lora_weights": "corda"}
EXAMPLES: dict[str, Any] = {"examples": batches()}


@pytest.mark.parametrize(
    ("fields", "given", "error", "said"),
    [
        (GA, {}, UsageError, "examples: none are given, and init_lora_weights 'lora_ga' starts from"),
        (CORDA, {}, UsageError, "examples: none are given, and init_lora_weights 'corda' starts from"),
        (GA, {"loss": loss}, UsageError, "loss is given, and no examples"),
        (CORDA, EXAMPLES | {"loss": loss}, UsageError, "'corda' starts without gradients; leave it out"),
        (GA, EXAMPLES, UsageError, "the loss of one is a NoneType; one number is wanted, .* or a loss="),
        (GA, EXAMPLES | {"loss": lambda outcome, _: outcome}, UsageError, r"the loss of one is a tensor \[40, 8\]"),
        (GA, EXAMPLES | {"loss": lambda *_: torch.tensor(1.0)}, MatchError, "0: none of the examples came to it"),
        (GA, EXAMPLES | {"loss": zero}, ValueRangeError, "0: its gradient holds NaN"),
        (CORDA, {"examples": [torch.zeros(4, 16)]}, ValueRangeError, "0: the covariance of its inputs is not finite"),
        (GA | {"r": 5}, EXAMPLES | {"loss": loss}, ConfigError, "2: r is 5, .* takes at most 4 parts"),
        (CORDA | {"r": 9}, EXAMPLES, ConfigError, "2: r is 9, .* takes at most 8 parts"),
        (CORDA | {"lora_alpha": 0}, EXAMPLES, ConfigError, "0: its scaling is 0.0, .* above 0"),
        (CORDA | {"corda_config": {"corda_method": "x"}}, EXAMPLES, ConfigError, "one of 'ipm', 'kpm' is wanted"),
        (CORDA | {"corda_config": {"cache_file": "x"}}, EXAMPLES, ConfigError, "no such file is read or written"),
        (GA | {"lora_ga_config": {"direction": "x"}}, EXAMPLES, ConfigError, "direction is 'x'; one of 'ArBr'"),
        (GA | {"lora_ga_config": {"scale": 1}}, EXAMPLES, ConfigError, "scale is '1'; one of 'stable'"),
        (GA | {"lora_ga_config": {"stable_gamma": 0}}, EXAMPLES, ConfigError, "stable_gamma is 0"),
        ({"corda_config": {"corda_method": "kpm"}}, {}, ConfigError, "init_lora_weights is not 'corda'"),
        (GA | {"use_dora": True}, EXAMPLES, ConfigError, "goes without use_dora"),
        (CORDA | {"target_modules": ["1"]}, EXAMPLES, MatchError, "1: a torch.nn.modules.activation.Tanh"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_gives_no_start_is_refused_and_nothing_changes(
    fields: dict[str, Any], given: dict[str, Any], error: type[Exception], said: str
) -> None:
    model = made()
    with pytest.raises(error, match=said):
        surgery.inject(model, surgery.LoraConfig(**FIELDS | fields), **given)
    assert [type(one) for one in model] == [nn.Linear, nn.Tanh, nn.Linear]
    assert all(one.requires_grad for one in model.parameters())
