"""BD-LoRA, one of whose factors is block-diagonal, through every procedure and beside peft."""

from pathlib import Path

import peft
import pytest
import torch
from checkpoint_folders import file_hashes, read_tensors, tensor_hashes, write_base
from peft.tuners.lora.config import BdLoraConfig
from safetensors.torch import load_file
from torch import Tensor, nn

import surgery
from surgery import ConfigError, LoraConfig, MatchError

BLOCKS = {"target_modules_bd_a": ["down"], "target_modules_bd_b": ["up"], "nblocks": 2, "match_strict": False}
FIELDS = {"r": 4, "lora_alpha": 8, "target_modules": ["up_proj", "down_proj", "head"]}
X = torch.linspace(-1, 1, 24).view(4, 6)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


class Net(nn.Module):
    """One layer of each form: B in blocks, A in blocks, neither."""

    def __init__(self) -> None:
        super().__init__()
        self.up_proj, self.down_proj, self.head = nn.Linear(6, 10), nn.Linear(10, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.down_proj(torch.tanh(self.up_proj(x))))


def net(dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(0)
    return Net().to(dtype)


def room(dtype: torch.dtype, out: Tensor) -> float:
    """Of three layers of at most 10 terms, each sum rounded once, in another order."""
    return 3 * 2 * (10 + 6) * torch.finfo(dtype).eps * max(1.0, float(out.abs().max()))


@pytest.fixture
def theirs(tmp_path: Path) -> peft.PeftModel:
    """A model of peft with an adapter of random factors, saved in `theirs`."""
    torch.manual_seed(1)
    model = peft.get_peft_model(net(), peft.LoraConfig(**FIELDS, use_bdlora=BdLoraConfig(**BLOCKS)))
    with torch.no_grad():
        for name, values in model.named_parameters():
            values.copy_(torch.randn_like(values) / 2 if "lora_" in name else values)
    model.save_pretrained(tmp_path / "theirs")
    return model.eval()


def test_files_go_both_ways_with_the_same_tensors_and_outputs(theirs: peft.PeftModel, tmp_path: Path) -> None:
    ours = surgery.load(net(), tmp_path / "theirs")
    out = theirs(X).detach()
    assert float((ours(X).detach() - out).abs().max()) <= room(torch.float32, out)
    surgery.save(ours, tmp_path / "ours")
    found, wanted = (load_file(tmp_path / one / "adapter_model.safetensors") for one in ("ours", "theirs"))
    assert tensor_hashes(found) == tensor_hashes(wanted)
    assert torch.equal(peft.PeftModel.from_pretrained(net(), tmp_path / "ours").eval()(X), out)


@each_dtype
@pytest.mark.usefixtures("theirs")
def test_merges_live_and_streaming_agree_and_come_back(dtype: torch.dtype, tmp_path: Path) -> None:
    base, adapter = write_base(tmp_path / "base", net(dtype).state_dict()), tmp_path / "theirs"
    model = surgery.load(net(dtype), adapter)
    before, out = tensor_hashes(model.state_dict()), model(X.to(dtype)).detach()
    surgery.merge(model)
    assert float((model(X.to(dtype)).detach() - out).abs().max()) <= 2 * room(dtype, out)
    surgery.unmerge(model)
    assert tensor_hashes(model.state_dict()) == before
    surgery.merge_checkpoint(base, adapter, tmp_path / "out", reversible=True)
    assert surgery.verify_checkpoint(base, adapter, tmp_path / "out").counts["bits"] == 3
    merged = surgery.eject(surgery.merge(model), keep_merged=True)
    assert tensor_hashes(read_tensors(tmp_path / "out")) == tensor_hashes(merged.state_dict())
    surgery.unmerge_checkpoint(tmp_path / "out", tmp_path / "back")
    assert file_hashes(tmp_path / "back") == file_hashes(base)


def test_a_merge_by_peft_passes_verify(theirs: peft.PeftModel, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", net().state_dict())
    out = write_base(tmp_path / "out", theirs.merge_and_unload().state_dict())
    surgery.verify_checkpoint(base, tmp_path / "theirs", out).require()


def test_a_fresh_one_changes_nothing_and_is_shaped_as_in_peft(theirs: peft.PeftModel) -> None:
    ours = surgery.inject(net(), LoraConfig(**FIELDS, use_bdlora=BLOCKS))
    assert torch.equal(ours(X), net()(X))
    wanted = {name.removeprefix("base_model.model."): one.shape for name, one in theirs.state_dict().items()}
    assert {name: one.shape for name, one in ours.state_dict().items()} == wanted
    given = surgery.inject(net(), peft.LoraConfig(**FIELDS, use_bdlora=BdLoraConfig(**BLOCKS)))
    assert {name: one.shape for name, one in given.state_dict().items()} == wanted


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"use_dora": True}, "use_bdlora is given; as in PEFT it goes without"),
        ({"init_lora_weights": "gaussian"}, "use_bdlora is given"),
        ({"use_bdlora": BLOCKS | {"match_strict": True}}, "no entry means head"),
        ({"use_bdlora": BLOCKS | {"target_modules_bd_a": ["proj"]}}, "both lists mean up_proj"),
        ({"use_bdlora": BLOCKS | {"nblocks": 0}}, "nblocks must be a whole number"),
        ({"use_bdlora": BLOCKS | {"more": 1}}, "a table of"),
        ({"use_bdlora": BLOCKS | {"target_modules_bd_b": "up"}}, "a list of parts of names"),
        ({"use_bdlora": 3}, "a table of"),
    ],
    ids=str,
)
def test_what_peft_refuses_or_nothing_means_is_refused(changed: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        surgery.inject(net(), LoraConfig(**FIELDS | {"use_bdlora": BLOCKS} | changed))


def test_layers_that_have_no_such_blocks_are_refused() -> None:
    with pytest.raises(MatchError, match="3 blocks, and its B"):
        surgery.inject(net(), LoraConfig(**FIELDS, use_bdlora=BLOCKS | {"nblocks": 3}))
    with pytest.raises(MatchError, match="use_bdlora is for Linear and Conv1D"):
        surgery.inject(nn.ModuleDict({"up": nn.Embedding(4, 4)}), LoraConfig(target_modules=["up"], use_bdlora=BLOCKS))
