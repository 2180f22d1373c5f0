"""The same bits from a live merge and from a checkpoint, however it is cut, tiled or threaded."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from checkpoint_folders import file_hashes, read_tensors, tensor_hashes, write_adapter, write_base
from torch import nn
from transformers import GPT2Config, GPT2Model

import surgery
from surgery.adapters.peft import read_adapter
from surgery.core.adapter import Weighted
from surgery.core.source import TILE_ELEMENTS
from surgery.hosts.checkpoint import Checkpoint
from surgery.procedures.writing.filling import Pace
from surgery.procedures.writing.merge_checkpoint import MergeReport, Options, merge_checkpoint

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CONFIG = GPT2Config(
    n_layer=1,
    n_embd=8,
    n_head=2,
    vocab_size=11,
    n_positions=4,
    bos_token_id=0,
    eos_token_id=0,
    architectures=["GPT2Model"],
)
WEIGHTS = (1.0, -0.3, 0.7)


class Plain(nn.Module):
    """Linear layers and an embedding, without any transformers config."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 8)
        self.blocks = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(8, 20), "same": nn.Linear(8, 8)}) for _ in "ab")
        self.head = nn.Linear(8, 9)


class Case:
    """A model's base in one file and in three, and its adapters; all from one seed."""

    def __init__(self, folder: Path, kind: str, dtype: torch.dtype) -> None:
        self.folder, self.kind, self.dtype = folder, kind, dtype
        model = self.model()
        tensors, config = dict(model.state_dict()), CONFIG.to_dict() if kind == "gpt2" else None
        self.whole = write_base(folder / "whole", tensors, 1, config)
        self.shards = write_base(folder / "shards", tensors, 3, config)
        targets = ["c_attn", "c_proj", "c_fc", "wte"] if kind == "gpt2" else ["up", "same", "embed"]
        for index in range(len(WEIGHTS)):
            settings = surgery.LoraConfig(
                r=4, lora_alpha=6, target_modules=targets[index:], init_lora_weights=False, use_rslora=index == 1
            )
            adapted = surgery.inject(self.model(), settings)
            surgery.save(adapted, folder / f"adapter-{index}")

    def model(self) -> nn.Module:
        torch.manual_seed(3)
        return (GPT2Model(CONFIG) if self.kind == "gpt2" else Plain()).to(self.dtype)

    def live(self) -> dict[str, str]:
        """Tensor hashes of the model merged live; each adapter's alpha is multiplied by its weight."""
        model = self.model()
        for index, weight in enumerate(WEIGHTS):
            weighted = self.folder / f"weighted-{index}"
            shutil.copytree(self.folder / f"adapter-{index}", weighted, dirs_exist_ok=True)
            config = json.loads((weighted / "adapter_config.json").read_text())
            config["lora_alpha"] *= weight  # exact, for r and its root are powers of two
            (weighted / "adapter_config.json").write_text(json.dumps(config))
            surgery.load(model, weighted, adapter_name=str(index))
        surgery.set_adapter(model, [str(index) for index in range(len(WEIGHTS))])
        surgery.eject(surgery.merge(model), keep_merged=True)
        return tensor_hashes(model.state_dict())

    def streamed(self, base: Path, out: Path, **options: object) -> MergeReport:
        adapters = [Weighted(read_adapter(self.folder / f"adapter-{i}"), w) for i, w in enumerate(WEIGHTS)]
        with Checkpoint(base) as source:
            pace = Pace(tile_elements=options.pop("tile_elements", TILE_ELEMENTS))
            return merge_checkpoint(source, adapters, out, Options(pace=pace, **options))


@pytest.fixture(scope="module", params=[(kind, dtype) for kind in ("plain", "gpt2") for dtype in DTYPES], ids=str)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("case"), *request.param)


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("tile_elements", [7, 64, 1 << 20])
def test_live_whole_and_sharded_merges_are_equal_for_any_tile_and_thread_count(
    case: Case, threads: int, tile_elements: int, tmp_path: Path
) -> None:
    live = case.live()
    untouched = tensor_hashes(case.model().state_dict())
    assert live.keys() == untouched.keys()
    assert live != untouched
    for base in (case.whole, case.shards):
        report = case.streamed(base, tmp_path / base.name, tile_elements=tile_elements, reversible=threads == 2)
        assert tensor_hashes(read_tensors(tmp_path / base.name)) == live
        changed = {name for name in live if live[name] != untouched[name]}
        assert changed == report.receipt["changed"].keys()
        assert untouched.keys() - changed == report.receipt["untouched"].keys()


def test_two_runs_in_different_folders_write_the_same_bytes(case: Case, threads: int, tmp_path: Path) -> None:
    other = Case(tmp_path / "elsewhere", case.kind, case.dtype)
    first = case.streamed(case.shards, tmp_path / "one", reversible=True)
    second = other.streamed(other.shards, tmp_path / "deeper" / "two", reversible=True, tile_elements=7 * threads)
    assert file_hashes(tmp_path / "one") == file_hashes(tmp_path / "deeper" / "two")
    assert first.receipt == second.receipt
    assert str(tmp_path) not in (tmp_path / "one" / "surgery.receipt.json").read_text()


@pytest.mark.usefixtures("threads")
def test_float64_weights_show_no_order_of_summation(tmp_path: Path) -> None:
    """The finest dtype and many terms: a plain product's last bits differ here from tile to tile."""
    torch.manual_seed(0)
    A, B = torch.randn(48, 64, dtype=torch.float64), torch.randn(96, 48, dtype=torch.float64)
    base = write_base(tmp_path / "base", {"up.weight": torch.randn(96, 64, dtype=torch.float64)})
    tensors = {"up.lora_A.weight": A, "up.lora_B.weight": B}
    adapter = read_adapter(write_adapter(tmp_path / "adapter", tensors, r=48, target_modules=["up"]))
    found = set()
    for tile_elements in (64, 64 * 7, 1 << 20):
        out, options = tmp_path / str(tile_elements), Options(pace=Pace(tile_elements=tile_elements))
        with Checkpoint(base) as source:
            merge_checkpoint(source, [Weighted(adapter)], out, options)
        found.add(tensor_hashes(read_tensors(out))["up.weight"])
    assert len(found) == 1
