"""Convolutions: adapters to peft and from it with equal outputs; its merges pass verify; where its forward is not
what it merges, ours is."""

import copy
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from pairs import gradients, saved, trainable, trained
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    ConvNextConfig,
    ConvNextModel,
    ResNetConfig,
    ResNetForImageClassification,
)

import surgery
from surgery.errors import MatchError

RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "num_labels": 3}


def sounds() -> nn.Module:
    """As the start of a speech encoder."""
    return nn.Sequential(
        nn.Conv1d(8, 16, 3, padding=1), nn.GELU(), nn.Conv1d(16, 16, 3, stride=2, padding="valid"), nn.Conv1d(16, 6, 1)
    )


def volumes() -> nn.Module:
    """Kernels, strides and paddings that differ by axis; one layer in two groups."""
    return nn.Sequential(
        nn.Conv3d(2, 6, (1, 3, 2), stride=(1, 2, 1), padding=(0, 1, 1)),
        nn.ReLU(),
        nn.Conv3d(6, 4, (2, 1, 1), bias=False),  # peft cannot merge a Conv3d of kernel (1, 1, ...)
        nn.Conv3d(4, 8, 2, groups=2),
    )


IMAGE, SOUND, VOLUME = (2, 3, 32, 32), (2, 8, 12), (2, 2, 4, 5, 4)
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "resnet": (lambda: ResNetForImageClassification(ResNetConfig(**RESNET)), IMAGE),
    "convnext": (lambda: ConvNextModel(ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2)), IMAGE),
    "sounds": (sounds, SOUND),
    "volumes": (volumes, VOLUME),
}
LORA = {
    "resnet": ("resnet", {"target_modules": ["convolution", "classifier.1"]}),
    "patch embedding": ("convnext", {"target_modules": ["patch_embeddings", "pwconv1"], "lora_dropout": 0.1}),
    "sounds": ("sounds", {"target_modules": ["0", "2", "3"], "rank_pattern": {"2": 2}}),
    "volumes": ("volumes", {"target_modules": ["0", "2"]}),
}
IA3 = {
    "resnet": ("resnet", {"target_modules": ["convolution"], "feedforward_modules": ["layer.1.convolution"]}),
    "depthwise": ("convnext", {"target_modules": ["dwconv"], "feedforward_modules": ["layers.0.dwconv"]}),
    "volumes": ("volumes", {"target_modules": ["0", "2", "3"], "feedforward_modules": ["2", "3"]}),
}
IA3["resnet"][1]["target_modules"] = ["convolution", "layer.1.convolution"]  # peft asks for a subset
IA3["depthwise"][1]["target_modules"] = ["dwconv", "layers.0.dwconv"]
CASES = [("LORA", name) for name in LORA] + [("IA3", name) for name in IA3]
each_case = pytest.mark.parametrize(("kind", "case"), CASES, ids=str)
FILE = "adapter_model.safetensors"


def settings(kind: str, case: str) -> tuple[str, peft.PeftConfig]:
    model, fields = (LORA if kind == "LORA" else IA3)[case]
    fields = copy.deepcopy(fields)
    if kind == "LORA":
        return model, peft.LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, **fields)
    return model, peft.IA3Config(**fields)


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[name][0]().eval()
    with torch.no_grad():
        for values in model.parameters():
            if values.dim() == 1:  # scales of a layer that are made tiny, and biases that are made zero
                values.normal_(mean=1, std=0.1)
    return model


def outputs(name: str, model: nn.Module) -> Tensor:
    torch.manual_seed(2)
    with torch.no_grad():
        out = model(torch.randn(MODELS[name][1]))
    return out if isinstance(out, Tensor) else out[0]


@each_case
def test_what_peft_saves_gives_equal_outputs_here_and_back_again(kind: str, case: str, tmp_path: Path) -> None:
    name, config = settings(kind, case)
    model = made(name)
    before, theirs = outputs(name, model), trained(peft.get_peft_model(copy.deepcopy(model), config), 1 / 4)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = surgery.load(copy.deepcopy(model), tmp_path / "theirs")
    assert torch.equal(outputs(name, ours), outputs(name, theirs))
    assert not torch.equal(outputs(name, ours), before)
    surgery.save(ours, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(model, tmp_path / "ours").eval()
    assert torch.equal(outputs(name, again), outputs(name, theirs))
    found, wanted = (load_file(tmp_path / one / FILE) for one in ("ours", "theirs"))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


@each_case
def test_a_config_hits_the_same_modules_with_the_same_shapes_as_in_peft(kind: str, case: str) -> None:
    name, config = settings(kind, case)
    wanted = trainable(peft.get_peft_model(made(name), copy.deepcopy(config)))
    assert trainable(surgery.inject(made(name), config)) == wanted


@each_case
def test_gradients_are_those_of_peft_to_the_bit(kind: str, case: str, tmp_path: Path) -> None:
    name, config = settings(kind, case)
    theirs = trained(peft.get_peft_model(made(name), config), 1 / 4)
    theirs.save_pretrained(tmp_path)
    ours = surgery.load(made(name), tmp_path, trainable=True)
    found = []
    for model in (theirs, ours):
        torch.manual_seed(2)
        out = model(torch.randn(MODELS[name][1]))
        (out if isinstance(out, Tensor) else out[0]).square().sum().backward()
        found.append(gradients(model))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])


@pytest.mark.parametrize("safe", [False, True], ids=["merge", "safe_merge"])
@each_case
def test_a_merge_by_peft_passes_verify_and_one_that_forgot_a_tensor_does_not(
    kind: str, case: str, safe: bool, tmp_path: Path
) -> None:
    name, config = settings(kind, case)
    model = made(name)
    base, theirs = saved(model, tmp_path / "base"), trained(peft.get_peft_model(model, config), 1 / 4)
    theirs.save_pretrained(tmp_path / "adapter")
    out = saved(theirs.merge_and_unload(safe_merge=safe), tmp_path / "out")
    surgery.verify_checkpoint(base, tmp_path / "adapter", out).require()
    before, after = (load_file(folder / "model.safetensors") for folder in (base, out))
    moved = next(key for key in before if before[key].dim() > 2 and not torch.equal(before[key], after[key]))
    save_file(after | {moved: before[moved]}, out / "model.safetensors")
    judged = surgery.verify_checkpoint(base, tmp_path / "adapter", out).tensors.items()
    assert [judge for judge, one in judged if one.grade == "different"] == [moved]


def grouped() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 8, 3, groups=2, padding=1), nn.ReLU(), nn.Conv2d(8, 6, 1)).eval()


def test_lora_in_groups_runs_as_in_peft_and_is_merged_by_neither(tmp_path: Path) -> None:
    """Each of its outputs depends on all channels, and the weight has place for those of a group alone."""
    x, config = torch.randn(2, 4, 5, 5), peft.LoraConfig(r=4, target_modules=["0"], init_lora_weights=False)
    theirs = peft.get_peft_model(grouped(), config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = surgery.load(grouped(), tmp_path / "theirs")
    assert torch.equal(ours(x), theirs(x))
    surgery.save(ours, tmp_path / "ours")
    assert torch.equal(peft.PeftModel.from_pretrained(grouped(), tmp_path / "ours").eval()(x), theirs(x))
    with pytest.raises(NotImplementedError):
        theirs.merge_and_unload()
    before = {name: values.clone() for name, values in ours.state_dict().items()}
    for act in (lambda: surgery.merge(ours), lambda: ours[0].weight):
        with pytest.raises(MatchError, match="0: a convolution in groups"):
            act()
    assert all(torch.equal(values, before[name]) for name, values in ours.state_dict().items())
    base = saved(grouped(), tmp_path / "base")
    assert "in groups" in str(surgery.plan(base, tmp_path / "theirs").refusals)
    with pytest.raises(MatchError, match="0: a convolution in groups"):
        surgery.merge_checkpoint(base, tmp_path / "theirs", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("tool", ["peft", "surgery"])
def test_a_rank_that_the_groups_do_not_divide_is_refused_as_in_peft(tool: str) -> None:
    config = peft.LoraConfig(r=3, target_modules=["0"])
    inject = peft.get_peft_model if tool == "peft" else surgery.inject
    with pytest.raises(ValueError if tool == "peft" else MatchError, match="groups"):
        inject(grouped(), config)


@pytest.mark.parametrize(
    "geometry",
    [{"padding_mode": "circular", "padding": 1}, {"dilation": 2, "padding": "same"}],
    ids=["padding mode", "dilation"],
)
def test_where_the_forward_of_peft_is_not_what_it_merges_ours_is_what_both_merge(
    geometry: dict[str, object], tmp_path: Path
) -> None:
    """peft's lora_A takes neither the padding mode of its layer nor its dilation."""
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3, **geometry)).double(), torch.randn(2, 3, 6, 6).double()
    config = peft.LoraConfig(r=4, target_modules=["0"], init_lora_weights=False)
    theirs = peft.get_peft_model(copy.deepcopy(model), config).eval()
    theirs.save_pretrained(tmp_path)
    ours = surgery.load(model, tmp_path)
    # Sums of 27 products for each of r rows, of r products, and of 27 with the merged weight, each rounded.
    near = {"rtol": 0, "atol": 64 * torch.finfo(x.dtype).eps * float(ours(x).abs().max())}
    apart = (theirs(x) - ours(x)).abs().max()
    torch.testing.assert_close(ours(x), theirs.merge_and_unload()(x), **near)
    assert apart > 0.1


def test_ia3_over_conv1d_is_refused_by_name_as_in_peft() -> None:
    fields = {"target_modules": ["2"], "feedforward_modules": []}
    with pytest.raises(ValueError, match="Conv1d"):
        peft.get_peft_model(made("sounds"), peft.IA3Config(**fields))
    with pytest.raises(MatchError, match="2: a Conv1d"):
        surgery.inject(made("sounds"), surgery.IA3Config(**fields))


def test_all_linear_leaves_convolutions_out_as_in_peft() -> None:
    def adapted(model: nn.Module) -> set[str]:
        return {name.rpartition(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A" in name}

    theirs = peft.get_peft_model(made("convnext"), peft.LoraConfig(target_modules="all-linear"))
    ours = surgery.inject(made("convnext"), surgery.LoraConfig(target_modules="all-linear"))
    assert adapted(ours) == {name.removeprefix("base_model.model.") for name in adapted(theirs)}
    assert adapted(ours)
