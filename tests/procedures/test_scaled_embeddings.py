"""Embeddings that multiply what they find (Gemma's, BART's): adapters run as they merge, and as in peft."""

import copy
from pathlib import Path

import peft
import pytest
import torch
from checkpoint_folders import read_tensors, tensor_hashes
from torch import Tensor, nn
from transformers import BartConfig, BartModel, Gemma3ForCausalLM, Gemma3TextConfig
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

import surgery
from surgery.errors import MatchError
from surgery.hosts.recognition import op_of

GEMMA = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 30}
GEMMA |= {"num_key_value_heads": 1, "head_dim": 16, "tie_word_embeddings": False}
BART = {"d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
BART |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": 30, "scale_embedding": True}
MODELS = {
    "gemma": (lambda: Gemma3ForCausalLM(Gemma3TextConfig(**GEMMA)), ["embed_tokens", "q_proj"]),
    "bart": (lambda: BartModel(BartConfig(**BART, tie_word_embeddings=False)).encoder, ["embed_tokens", "q_proj"]),
}
DTYPES = (torch.float32, torch.bfloat16)


def made(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name][0]().to(dtype).eval()


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(torch.arange(12)[None])[0]


@pytest.mark.parametrize("name", MODELS)
def test_an_adapter_gives_equal_outputs_here_and_in_peft_both_ways(name: str, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, target_modules=MODELS[name][1], init_lora_weights=False)
    before, theirs = outputs(made(name)), peft.get_peft_model(made(name), config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = surgery.load(made(name), tmp_path / "theirs")
    assert torch.equal(outputs(ours), outputs(theirs))  # the scale is a power of two, the square root of 64
    assert not torch.equal(outputs(ours), before)
    surgery.save(ours, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(made(name), tmp_path / "ours").eval()
    assert torch.equal(outputs(again), outputs(ours))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_a_live_merge_is_that_on_files_to_the_bit_and_is_undone(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = made(name, dtype)
    model.save_pretrained(tmp_path / "base")
    original = tensor_hashes(model.state_dict())
    config = surgery.LoraConfig(r=4, target_modules=["embed_tokens"], init_lora_weights=False)
    ours = surgery.inject(copy.deepcopy(model), config)
    surgery.save(ours, tmp_path / "adapter")
    surgery.merge(ours)
    surgery.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    live = tensor_hashes(surgery.eject(copy.deepcopy(ours), keep_merged=True).state_dict())
    streamed = tensor_hashes(read_tensors(tmp_path / "out"))
    assert streamed == {key: live[key] for key in streamed}
    assert live != original
    assert tensor_hashes(surgery.eject(ours).state_dict()) == original


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("scale", [5.1, 8.0])
def test_the_adapted_embedding_is_the_merged_one_at_any_scale(dtype: torch.dtype, scale: float) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(Gemma3TextScaledWordEmbedding(9, 6, 0, scale)).to(dtype), torch.arange(9)
    ours = surgery.inject(model, surgery.LoraConfig(r=2, lora_alpha=2, target_modules=["0"], init_lora_weights=False))
    before = ours.get_submodule("0").base_layer(x)
    effective, after = ours.get_submodule("0").weight, ours(x)
    surgery.merge(ours)
    # Both round some six times on the way to a number of this size; the grid costs r * 2^-21 of each product.
    size = scale * float(effective.detach().abs().max() + model.get_submodule("0").weight.detach().abs().max() + 16)
    bound = (6 * torch.finfo(dtype).eps + 2 * 2.0**-21) * size
    assert float((ours(x) - after).detach().abs().max()) <= bound
    assert float((after - before).detach().abs().max()) > 2 * bound


class Shifted(nn.Embedding):
    """It has a scale, and does something else with it."""

    embed_scale = 2.0

    def forward(self, input_ids: Tensor) -> Tensor:
        return super().forward(input_ids) + self.embed_scale


class Twice(Gemma3TextScaledWordEmbedding):
    """It scales what is scaled already."""

    def forward(self, input_ids: Tensor) -> Tensor:
        return super().forward(input_ids) * self.embed_scale


class Renamed(Gemma3TextScaledWordEmbedding):
    """It computes as Gemma's."""


def test_an_embedding_is_known_by_what_its_forward_does_not_by_its_name() -> None:
    learned = Gemma3TextScaledWordEmbedding(5, 4, 0, 3.0)
    del learned.embed_scale
    learned.embed_scale = nn.Parameter(torch.tensor(3.0))  # which no op could hold
    for module in (Shifted(5, 4), Twice(5, 4, 0, 3.0), learned):
        with pytest.raises(MatchError, match=type(module).__name__):
            surgery.inject(nn.Sequential(module), surgery.LoraConfig(target_modules=["0"]))
    assert (
        op_of(Renamed(5, 4, 0, 3.0)) == op_of(Gemma3TextScaledWordEmbedding(5, 4, 0, 3.0)) != op_of(nn.Embedding(5, 4))
    )
