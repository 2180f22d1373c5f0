"""Convolutions live and on files: the same bits from both, undone to the bit; effective weights; refusals."""

import copy
from pathlib import Path

import pytest
import torch
from checkpoint_folders import file_hashes, read_tensors, tensor_hashes, write_adapter, write_base
from torch import Tensor, nn
from transformers import WhisperConfig, WhisperModel

import surgery
from surgery.errors import MatchError, ShapeError

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Net(nn.Module):
    """A convolution of each kind, and a linear layer at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, (3, 2), stride=2, padding=1, dilation=(1, 2), padding_mode="reflect")
        self.point = nn.Conv2d(8, 8, 1)
        self.groups = nn.Conv2d(8, 12, 3, padding="same", groups=4)
        self.line = nn.Conv1d(12, 6, 3, padding=2, dilation=2)
        self.volume = nn.Conv3d(1, 4, (1, 1, 2), bias=False)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.groups(self.point(self.stem(x)).relu())  # [batch, 12, high, wide]
        h = self.line(h.flatten(2)).unsqueeze(1).unsqueeze(1)  # [batch, 1, 1, 6, places]
        return self.head(self.volume(h).sum((2, 3, 4)))


LORA = surgery.LoraConfig(
    r=4, lora_alpha=8, target_modules=["stem", "point", "line", "volume", "head"], init_lora_weights=False
)
IA3 = surgery.IA3Config(
    target_modules=["stem", "point", "groups", "volume"],
    feedforward_modules=["point", "groups"],
    init_ia3_weights=False,
)
CONFIGS = {"lora": [LORA], "ia3": [IA3], "ia3 over lora": [LORA, IA3]}


def made(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return Net().to(dtype).eval()


def adapted(model: nn.Module, configs: list[surgery.LoraConfig | surgery.IA3Config]) -> nn.Module:
    torch.manual_seed(1)
    names = [f"a{index}" for index in range(len(configs))]
    for name, config in zip(names, configs, strict=True):
        surgery.inject(model, config, adapter_name=name)
    surgery.set_adapter(model, names)
    return model


def image(dtype: torch.dtype = torch.float32) -> Tensor:
    torch.manual_seed(2)
    return torch.randn(2, 3, 9, 9, dtype=dtype)


@pytest.fixture(params=CONFIGS)
def configs(request: pytest.FixtureRequest) -> list[surgery.LoraConfig | surgery.IA3Config]:
    return CONFIGS[request.param]


def test_the_adapted_model_of_whole_numbers_computes_as_the_merged_one_to_the_bit(
    configs: list[surgery.LoraConfig | surgery.IA3Config],
) -> None:
    model, x = made(torch.float64), image(torch.float64).round()
    ours = adapted(model, configs)
    with torch.no_grad():
        for values in ours.parameters():
            values.copy_(torch.randint(-2, 3, values.shape))
        with surgery.disable_adapters(ours):
            before = ours(x)
        after = ours(x)
        surgery.merge(ours)
        assert torch.equal(ours(x), after)
    assert not torch.equal(before, after)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_live_merge_is_that_on_files_to_the_bit_and_both_are_undone(
    configs: list[surgery.LoraConfig | surgery.IA3Config],
    dtype: torch.dtype,
    memory_format: torch.memory_format,
    tmp_path: Path,
) -> None:
    model = made(dtype)
    for name, module in model.named_children():
        if name in ("stem", "point", "groups"):
            module.to(memory_format=memory_format)
    original = tensor_hashes(model.state_dict())
    base = write_base(tmp_path / "base", {name: v.contiguous() for name, v in model.state_dict().items()}, shards=3)
    ours = adapted(copy.deepcopy(model), configs)
    surgery.save(ours, tmp_path / "adapters")
    adapters = [tmp_path / "adapters" / f"a{index}" for index in range(len(configs))]
    surgery.merge_checkpoint(base, adapters, tmp_path / "out", reversible=True)
    surgery.verify_checkpoint(base, adapters, tmp_path / "out").require()
    surgery.merge(ours)
    live = tensor_hashes(surgery.eject(copy.deepcopy(ours), keep_merged=True).state_dict())
    assert tensor_hashes(read_tensors(tmp_path / "out")) == live
    assert live != original
    surgery.unmerge_checkpoint(tmp_path / "out", tmp_path / "back")
    assert file_hashes(tmp_path / "back") == file_hashes(base)
    assert tensor_hashes(surgery.eject(ours).state_dict()) == original


def test_the_effective_weight_and_bias_are_those_of_the_merge_and_carry_gradients(
    configs: list[surgery.LoraConfig | surgery.IA3Config],
) -> None:
    ours = adapted(made(torch.float64), configs)
    with torch.no_grad():
        for values in ours.parameters():
            values.copy_(torch.randint(-2, 3, values.shape))
    layers = {name: getattr(ours, name) for name in ("stem", "point", "groups", "volume")}
    effective = {name: (layer.weight, layer.bias) for name, layer in layers.items()}
    sum(weight.square().sum() for weight, _ in effective.values()).backward()
    assert all(values.grad is not None for values in ours.stem.parameters() if values.requires_grad)
    surgery.eject(surgery.merge(ours), keep_merged=True)
    for name, (weight, bias) in effective.items():
        assert torch.equal(weight, getattr(ours, name).weight)
        assert bias is None or torch.equal(bias, getattr(ours, name).bias)


def test_a_fresh_adapter_changes_no_output_and_eject_gives_the_very_modules_back() -> None:
    model, modules = made(), dict(made().named_modules()).keys()
    before, held = model(image()), dict(model.named_modules())
    for start in (True, "gaussian"):
        ours = surgery.inject(model, surgery.LoraConfig(r=4, target_modules=["stem", "line"], init_lora_weights=start))
        assert torch.equal(ours(image()), before)
        surgery.eject(ours)
    assert {name: id(module) for name, module in model.named_modules()} == {n: id(m) for n, m in held.items()}
    assert held.keys() == modules


def test_whisper_reads_what_it_asks_of_its_convolutions_through_their_adapters() -> None:
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "vocab_size": 20}
    sizes |= {"decoder_attention_heads": 2, "num_mel_bins": 8, "max_source_positions": 6, "pad_token_id": 0}
    model = WhisperModel(WhisperConfig(**sizes, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1)).eval()
    sound = torch.randn(2, 8, 12)
    ours = surgery.inject(model, surgery.LoraConfig(r=2, target_modules=["conv1", "conv2"], init_lora_weights=False))
    with torch.no_grad():
        after = ours.encoder(sound)[0]
        surgery.merge(ours)
        merged = ours.encoder(sound)[0]
    # The encoder ends in a layer norm, so that its numbers are about 1: sums of 48, 16 and 64 terms on the way.
    torch.testing.assert_close(after, merged, rtol=0, atol=128 * 2.0**-21)


@pytest.mark.parametrize(
    "module",
    [nn.ConvTranspose1d(2, 2, 1), nn.ConvTranspose2d(2, 2, 1), nn.ConvTranspose3d(2, 2, 1)],
    ids=lambda module: type(module).__name__,
)
def test_a_transposed_convolution_is_refused_by_name(module: nn.Module) -> None:
    kind = type(module).__name__
    with pytest.raises(MatchError, match=f"0: a torch.*{kind}; .*Conv1d, Conv2d, Conv3d and MultiheadAttention can"):
        surgery.inject(nn.Sequential(module), surgery.LoraConfig(target_modules=["0"]))


@pytest.mark.parametrize(
    ("weight", "A", "B"),
    [
        ((8, 3, 3, 3), (4, 3, 3, 2), (8, 4, 1, 1)),  # another kernel
        ((8, 3, 3, 3), (4, 3, 3), (8, 4, 1)),  # of one axis less
        ((8, 3, 3, 3), (4, 27), (8, 4)),  # as matrices
        ((8, 27), (4, 3, 3, 3), (8, 4, 1, 1)),  # a matrix, a convolution over it
        ((8, 3, 3, 3), (4, 7, 3, 3), (8, 4, 1, 1)),  # no whole number of groups
        ((8, 3, 3, 3), (4, 6, 3, 3), (8, 3, 1, 1)),  # a group's share of r that is none
        ((8, 3, 0, 3), (4, 3, 0, 3), (8, 4, 1, 1)),  # a kernel of nothing
        ((8, 3, 1, 1, 1, 1), (4, 3, 1, 1, 1, 1), (8, 4, 1, 1, 1, 1)),  # of too many axes
        ((8,), (4, 1), (8, 4)),
    ],
    ids=str,
)
def test_factors_that_do_not_fit_the_stored_weight_are_refused(
    weight: tuple[int, ...], A: tuple[int, ...], B: tuple[int, ...], tmp_path: Path
) -> None:
    base = write_base(tmp_path / "base", {"up.weight": torch.randn(weight)})
    factors = {"up.lora_A.weight": torch.randn(A), "up.lora_B.weight": torch.randn(B)}
    adapter = write_adapter(tmp_path / "adapter", factors, target_modules=["up"])
    with pytest.raises(ShapeError, match="up"):
        surgery.merge_checkpoint(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_layout_that_is_told_for_a_convolution_is_refused(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", {"up.weight": torch.randn(8, 3, 3, 3)})
    factors = {"up.lora_A.weight": torch.randn(4, 3, 3, 3), "up.lora_B.weight": torch.randn(8, 4, 1, 1)}
    adapter = write_adapter(tmp_path / "adapter", factors, target_modules=["up"])
    with pytest.raises(surgery.ShapeError, match=r"up: its weight is .*a matrix is wanted for linear"):
        surgery.merge_checkpoint(base, adapter, tmp_path / "out", ops={"up": "linear"})


def test_a_convolution_of_another_sort_is_refused_by_its_class() -> None:
    class Standardized(nn.Conv2d):
        def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return super()._conv_forward(x, weight - weight.mean(), bias)

    with pytest.raises(MatchError, match="Standardized"):
        surgery.inject(nn.Sequential(Standardized(2, 2, 1)), surgery.LoraConfig(target_modules=["0"]))
    with pytest.raises(MatchError, match="call the model once first"):
        surgery.inject(nn.Sequential(nn.LazyConv2d(2, 1)), surgery.LoraConfig(target_modules=["0"]))
