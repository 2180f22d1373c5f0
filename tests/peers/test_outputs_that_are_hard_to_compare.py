"""verify --outputs of models that draw numbers, mask by their dtype, or route by a hair: right passes, wrong fails."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_architectures_sweep import FAMILIES, SIZES
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

import surgery
from surgery.integrations.transformers import outputs
from surgery.procedures.checking.outputs import drawing_alike, run

# Each masks, or draws, in another way: see the tests below.
HARD = (
    "ViTMAEForPreTraining",
    "SplinterForQuestionAnswering",
    "ProphetNetForConditionalGeneration",
    "EomtForUniversalSegmentation",
)


def made(name: str, folder: Path, dtype: torch.dtype = torch.float32, seed: int = 0, **fields: Any) -> Path:
    """A base, an adapter of all its linear layers, and their merge."""
    kind = getattr(transformers, name)
    known = kind.config_class().to_dict()
    sizes = {one: value for one, value in SIZES.items() if one in known} | {**FAMILIES[name], **fields}
    torch.manual_seed(seed)
    model = kind(kind.config_class(**sizes))
    with torch.no_grad():
        for values in model.parameters():
            if values.dim() > 1:
                values.normal_(0, values[0].numel() ** -0.5)
    model.to(dtype).save_pretrained(folder / "base")
    model = kind.from_pretrained(folder / "base", dtype=dtype)
    config = surgery.LoraConfig(r=4, lora_alpha=2, target_modules="all-linear", init_lora_weights=False)
    surgery.save(surgery.inject(model, config), folder / "adapter")
    surgery.merge_checkpoint(folder / "base", folder / "adapter", folder / "out")
    return folder


def verified(folder: Path) -> Any:
    return surgery.verify_checkpoint(folder / "base", folder / "adapter", folder / "out", outputs=True).outputs


def with_one_left_out(folder: Path) -> Path:
    """The merge without the change of one weight: the last that stands in a layer."""
    path = folder / "out" / "model.safetensors"
    tensors, base = load_file(path), load_file(folder / "base" / "model.safetensors")
    changed = [name for name, one in tensors.items() if "layers.1." in name or "layer.1." in name]
    name = next(name for name in changed if not torch.equal(tensors[name], base[name]))
    save_file(tensors | {name: base[name]}, path, {"format": "pt"})
    return folder


@pytest.mark.parametrize("name", HARD)
def test_a_right_merge_agrees_and_a_wrong_one_does_not(name: str, tmp_path: Path) -> None:
    folder = made(name, tmp_path)
    told = verified(folder)
    assert told.ok, told.table()
    assert not verified(with_one_left_out(folder)).ok


def test_where_rounding_switches_experts_the_same_weights_are_compared_in_float32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of four experts in each of four layers: of this seed a run in bfloat16 takes another than one in float64."""
    few = {"num_hidden_layers": 4, "num_experts_per_tok": 1}
    folder = made("GptOssForCausalLM", tmp_path, torch.bfloat16, seed=3, **few)
    told = verified(folder)
    assert told.ok, told.table()
    with monkeypatch.context() as patch:
        patch.setattr(outputs, "_wider", lambda *given: given[-1].floor)
        assert "noise floor" in verified(folder).why
    assert not verified(with_one_left_out(folder)).ok


class Drawing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + torch.rand(4)


def test_what_a_model_draws_is_the_same_in_each_run_and_leaves_the_generator_as_it_was() -> None:
    model, x, before = Drawing(), torch.ones(1, 4), torch.get_rng_state()
    first = run(model, x).outputs["output"]
    torch.rand(3)
    assert torch.equal(run(model, x).outputs["output"], first)
    torch.set_rng_state(before)
    run(model, x)
    assert torch.equal(torch.get_rng_state(), before)


def test_what_is_drawn_on_another_device_is_the_same_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Generators of the CPU stand for those of two GPUs, of which the model lies on the second."""
    first, second = torch.Generator().manual_seed(5), torch.Generator().manual_seed(6)
    monkeypatch.setattr(torch.cuda, "default_generators", (first, second))
    before, drawn = [one.get_state() for one in (first, second)], []
    for _ in range(2):
        with drawing_alike({torch.device("cuda", 1), torch.device("cpu"), torch.device("meta")}):
            drawn += [torch.rand(3, generator=second), torch.rand(3)]
        assert torch.equal(second.get_state(), before[1])
        torch.rand(1, generator=second)
        before[1] = second.get_state()
    assert torch.equal(drawn[0], drawn[2])
    assert torch.equal(drawn[1], drawn[3])
    assert torch.equal(first.get_state(), before[0])


class Masking(nn.Module):
    """As Splinter masks its logits, or, by a number of the default dtype, as ProphetNet does its scores."""

    def __init__(self, default: bool) -> None:
        super().__init__()
        self.linear, self.default = nn.Linear(4, 4), default

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        logits = self.linear(x)
        return logits + ((1.0 if self.default else 1) - mask) * torch.finfo(logits.dtype).min


@pytest.mark.parametrize("default", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_what_is_masked_is_so_in_any_dtype(dtype: torch.dtype, default: bool) -> None:
    given = {"x": torch.ones(1, 4, dtype=dtype), "mask": torch.tensor([1, 0, 1, 0])}
    (values,) = run(Masking(default).to(dtype), given).outputs["output"]
    assert values.isfinite().tolist() == [True, False, True, False]
    assert values[[1, 3]].tolist() == [-float("inf")] * 2
    assert torch.get_default_dtype() == torch.float32


class Attending(nn.Module):
    """With a mask in float32, as EoMT."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = self.linear(x)
        return scaled_dot_product_attention(x, x, x, attn_mask=mask.float().masked_fill(~mask, -1e9))


def test_attention_in_float64_reads_a_float32_mask_as_it_is() -> None:
    torch.manual_seed(0)
    model, x, mask = Attending(), torch.randn(3, 2, 26, 8), torch.rand(3, 1, 26, 26) > 0.5
    narrow = run(model, {"x": x, "mask": mask}).outputs["output"]
    wide = run(model.double(), {"x": x.double(), "mask": mask}).outputs["output"]
    # Sums of 8 and of 26 terms, each of a size that is at most the largest, through a softmax.
    assert float((narrow - wide).abs().max()) <= 4 * (8 + 26) * torch.finfo(torch.float32).eps * float(x.abs().max())
