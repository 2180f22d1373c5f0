"""AdaLoRA against PEFT's: files both ways in each phase of the training, outputs, merges, ranks, losses."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

import surgery

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99}
TOKENS = torch.arange(24).reshape(2, 12)
FIELDS: dict[str, Any] = {"init_r": 6, "target_r": 3, "tinit": 3, "tfinal": 4, "total_step": 14, "lora_alpha": 20}
PHASES = {"before": 2, "between": 8, "after": 13}  # steps: of tinit, and of total_step - tfinal
TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "mlp.c_fc"]}
FILE = "model.safetensors"
each_model = pytest.mark.parametrize("case", TARGETS)
each_phase = pytest.mark.parametrize("phase", PHASES)


def made(case: str = "llama", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(0)
    if case == "gpt2":
        return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=99)).to(dtype).eval()
    return LlamaForCausalLM(LlamaConfig(**SMALL)).to(dtype).eval()


def theirs(case: str = "llama", dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    task = {"task_type": "CAUSAL_LM"}  # without one peft leaves the regularizer out of the loss
    config = peft.AdaLoraConfig(target_modules=TARGETS[case], **(task | FIELDS | options))
    model = peft.get_peft_model(made(case, dtype), config)
    for name, values in model.named_parameters():
        if ".ranknum." in name:  # over a base of half precision peft trains it, and does not save it
            values.requires_grad_(False)
    return model


def loss_of(model: nn.Module) -> Tensor:
    found: Tensor = model(input_ids=TOKENS, labels=TOKENS).loss
    return found


def train_theirs(model: Any, steps: int) -> Any:
    optimizer = torch.optim.AdamW([values for values in model.parameters() if values.requires_grad], lr=0.02)
    for step in range(steps):
        loss_of(model).backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    return model


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def close(one: Tensor, other: Tensor) -> bool:
    """A sum of 64 terms or fewer in each of a few layers, in whatever order, with what they are scaled by."""
    return bool((one - other).abs().max() <= 64 * torch.finfo(one.dtype).eps * max(1, float(other.abs().max())))


@each_model
@each_phase
def test_an_adapter_of_peft_gives_its_outputs_here_and_ours_gives_ours_there(
    case: str, phase: str, tmp_path: Path
) -> None:
    model = train_theirs(theirs(case), PHASES[phase])
    wanted = outputs(model)
    model.save_pretrained(tmp_path / "theirs")
    ours = surgery.load(made(case), tmp_path / "theirs")
    assert not close(outputs(made(case)), wanted)
    assert close(outputs(ours), wanted)
    surgery.save(ours, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(made(case), tmp_path / "ours")
    assert close(outputs(again), wanted)
    tensors = [load_file(tmp_path / one / "adapter_model.safetensors") for one in ("theirs", "ours")]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(values, tensors[1][name]) for name, values in tensors[0].items())
    masks = [json.loads((tmp_path / one / "adapter_config.json").read_text()) for one in ("theirs", "ours")]
    assert masks[0]["rank_pattern"] == masks[1]["rank_pattern"]
    assert (masks[0]["rank_pattern"] is None) == (phase == "before")


def test_every_field_that_peft_writes_is_read_and_written_again(tmp_path: Path) -> None:
    peft.AdaLoraConfig(total_step=9).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert surgery.AdaLoraConfig(total_step=9).to_json() == written
    assert surgery.AdaLoraConfig.from_json(written) == surgery.AdaLoraConfig(total_step=9)


@pytest.mark.parametrize("safe", [False, True], ids=["merge", "safe_merge"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@each_model
def test_a_merge_by_peft_passes_verify_and_one_that_forgot_a_tensor_does_not(
    case: str, dtype: torch.dtype, safe: bool, tmp_path: Path
) -> None:
    model = train_theirs(theirs(case, dtype), PHASES["after"])
    made(case, dtype).save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    model.merge_and_unload(safe_merge=safe).save_pretrained(tmp_path / "out")
    places = tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
    report = surgery.verify_checkpoint(*places)
    report.require()
    before, after = (load_file(place / FILE) for place in (places[0], places[2]))
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert moved
    save_file(after | {moved[0]: before[moved[0]]}, places[2] / FILE, {"format": "pt"})
    judged = surgery.verify_checkpoint(*places).tensors.items()
    assert [name for name, one in judged if one.grade == "different"] == moved[:1]


@each_model
@each_phase
def test_a_streaming_merge_is_the_live_one_and_both_come_back_to_the_bit(case: str, phase: str, tmp_path: Path) -> None:
    model = train_theirs(theirs(case), PHASES[phase])
    model.save_pretrained(tmp_path / "adapter")
    made(case).save_pretrained(tmp_path / "base")
    surgery.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", reversible=True)
    live = surgery.load(made(case), tmp_path / "adapter")
    before = {name: values.clone() for name, values in live.state_dict().items()}
    adapted = outputs(live)
    surgery.merge(live)
    assert close(outputs(live), adapted)
    read = type(live).from_pretrained(tmp_path / "out").eval()
    assert torch.equal(outputs(read), outputs(live))
    surgery.unmerge(live)
    assert all(torch.equal(values, before[name]) for name, values in live.state_dict().items())
    surgery.unmerge_checkpoint(tmp_path / "out", tmp_path / "back")
    assert (tmp_path / "back" / FILE).read_bytes() == (tmp_path / "base" / FILE).read_bytes()


def test_lora_and_adalora_lie_over_the_same_layers_in_either_order(tmp_path: Path) -> None:
    """peft has no model for both."""
    train_theirs(theirs(), PHASES["after"]).save_pretrained(tmp_path / "ada")
    lora = surgery.inject(made(), surgery.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    surgery.save(lora, tmp_path / "lora")
    folders = [tmp_path / "ada", tmp_path / "lora"]
    for first, second in (folders, folders[::-1]):
        model = surgery.load(made(), first, adapter_name="one")
        surgery.load(model, second, adapter_name="two")
        surgery.set_adapter(model, ["one", "two"])
        state = model.state_dict()
        assert {".".join(name.split(".")[-2:]) for name in state if "q_proj.lora_A" in name} <= {
            "lora_A.one", "one.weight", "lora_A.two", "two.weight"
        }  # fmt: skip
        assert model.get_adapter_state_dict("two", state).keys() == model.get_adapter_state_dict("two").keys()
        adapted = outputs(model)
        assert close(outputs(surgery.merge(model)), adapted)
        surgery.unmerge(model)
        model.delete_adapter("one")
        alone = surgery.load(made(), second, adapter_name="two")
        surgery.set_adapter(model, "two")
        assert torch.equal(outputs(model), outputs(alone))


def started_alike(**options: Any) -> tuple[Any, Any]:
    """A model of peft and ours with the same fresh adapter."""
    model = theirs(**options)
    ours = surgery.inject(made(), model.peft_config["default"])
    tensors = {name.removeprefix("base_model.model."): values for name, values in model.state_dict().items()}
    missing, left_over = ours.load_state_dict(tensors, strict=False)
    assert not missing
    assert all(".ranknum." in name for name in left_over)
    return model, ours


@pytest.mark.parametrize(
    "options",
    [{}, {"deltaT": 3}, {"tfinal": 0}, {"tinit": 0, "beta1": 0.5, "beta2": 0.9}, {"orth_reg_weight": 0.0}],
    ids=str,
)
def test_losses_masks_and_merges_of_a_training_are_those_of_peft(options: dict[str, Any], tmp_path: Path) -> None:
    model, ours = started_alike(**options)
    both = [model, ours]
    optimizers = [
        torch.optim.AdamW([values for values in one.parameters() if values.requires_grad], lr=0.02) for one in both
    ]
    seen = set()
    for step in range(16):
        losses = [loss_of(one) for one in both]
        assert close(losses[1].detach(), losses[0].detach())
        for loss, optimizer in zip(losses, optimizers, strict=True):
            loss.backward()
            optimizer.step()
        model.base_model.update_and_allocate(step)
        surgery.adalora_step(ours, step)
        masks = [one.peft_config["default"].rank_pattern for one in both]
        wanted = masks[0] and {name.removesuffix(".default"): mask for name, mask in masks[0].items()}
        assert masks[1] == wanted
        seen.add(str(wanted))
        for optimizer in optimizers:
            optimizer.zero_grad()
    assert len(seen) > 2
    assert close(outputs(ours), outputs(model))
    model.save_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    written = [json.loads((tmp_path / one / "adapter_config.json").read_text()) for one in ("theirs", "ours")]
    assert written[0]["rank_pattern"] == written[1]["rank_pattern"]
    merged = surgery.load(made(), tmp_path / "ours")
    assert close(outputs(surgery.merge(merged)), outputs(model.merge_and_unload()))


class Pictures(nn.Module):
    """A convolution below a linear layer."""

    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(4, 4, 3, stride=2, padding=1, groups=groups)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(self.conv(x).relu().flatten(1))
        return found


def test_convolutions_are_trained_saved_and_merged_as_by_peft(tmp_path: Path) -> None:
    fields = {"init_r": 4, "target_r": 2, "total_step": 8, "target_modules": ["conv", "head"]}
    model: Any = peft.get_peft_model(Pictures(), peft.AdaLoraConfig(**fields))
    ours, x = surgery.inject(Pictures(), surgery.AdaLoraConfig(**fields)), torch.linspace(-1, 1, 128).view(2, 4, 4, 4)
    start = {name.removeprefix("base_model.model."): values for name, values in model.state_dict().items()}
    assert not ours.load_state_dict(start, strict=False).missing_keys
    both = [model, ours]
    optimizers = [torch.optim.AdamW([one for one in net.parameters() if one.requires_grad], lr=0.02) for net in both]
    for step in range(8):
        for net, optimizer in zip(both, optimizers, strict=True):
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()
        model.base_model.update_and_allocate(step)
        surgery.adalora_step(ours, step)
        assert close(ours(x), model(x))
    model.save_pretrained(tmp_path / "theirs")
    surgery.save(ours, tmp_path / "ours")
    told = [json.loads((tmp_path / one / "adapter_config.json").read_text()) for one in ("theirs", "ours")]
    assert told[0]["rank_pattern"] == told[1]["rank_pattern"]
    assert sum(map(sum, told[1]["rank_pattern"].values())) == 4
    assert close(surgery.load(Pictures(), tmp_path / "theirs")(x), model(x))
    assert close(peft.PeftModel.from_pretrained(Pictures(), tmp_path / "ours")(x), ours(x))
    merged = model.merge_and_unload().state_dict()
    for name, tensors in {"base": Pictures().state_dict(), "out": merged}.items():
        (tmp_path / name).mkdir()
        save_file(dict(tensors), tmp_path / name / FILE, {"format": "pt"})
    places = tmp_path / "base", tmp_path / "theirs"
    surgery.verify_checkpoint(*places, tmp_path / "out").require()
    surgery.merge_checkpoint(*places, tmp_path / "as-peft", arithmetic="peft")
    found = load_file(tmp_path / "as-peft" / FILE)
    assert all(torch.equal(found[name], values) for name, values in merged.items())
    assert not torch.equal(merged["conv.weight"], Pictures().conv.weight)


def test_convolutions_in_groups_are_refused_where_peft_fails_in_the_forward_pass() -> None:
    fields = {"total_step": 8, "target_modules": ["conv"]}
    with pytest.raises(RuntimeError, match="invalid for input of size"):
        peft.get_peft_model(Pictures(groups=2), peft.AdaLoraConfig(**fields))(torch.ones(2, 4, 4, 4))
    with pytest.raises(
        surgery.MatchError, match=r"conv: its op is convolution over 2 axes in 2 groups; AdaLoRA acts on"
    ):
        surgery.inject(Pictures(groups=2), surgery.AdaLoraConfig(**fields))
