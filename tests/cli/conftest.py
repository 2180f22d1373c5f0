"""A tiny base and adapter, and the command line called as a user calls it."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "procedures"))

from checkpoint_folders import base_tensors, write_adapter, write_base
from outcomes import Outcome, Run

from surgery.cli import main


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: object) -> Outcome:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main([str(one) for one in arguments])
        code = stopped.value.code
        assert code is None or isinstance(code, int)
        return Outcome(code or 0, *capsys.readouterr())

    return call


@pytest.fixture
def base(tmp_path: Path) -> Path:
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}
    return write_base(tmp_path / "base", base_tensors(torch.bfloat16), config=config)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "adapter")
