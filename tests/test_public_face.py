"""What `import surgery` shows, and what it costs."""

import resource
import subprocess
import sys
from importlib.metadata import version
from inspect import signature
from pydoc import plaintext, render_doc

import torch

import surgery
from surgery.cli import surgery as command


def test_all_is_sorted_and_every_name_is_there_and_documented() -> None:
    assert surgery.__all__ == sorted(surgery.__all__)
    assert all(getattr(surgery, name).__doc__ for name in surgery.__all__)


def test_help_of_a_config_shows_its_own_fields() -> None:
    assert list(signature(surgery.IA3Config).parameters)[-2:] == ["fan_in_fan_out", "init_ia3_weights"]
    assert signature(surgery.LoraConfig).parameters["lora_alpha"].default == 8
    assert "lora_alpha: float = 8" in render_doc(surgery.LoraConfig, renderer=plaintext).split("Method resolution")[0]


def test_import_takes_no_torch_until_a_name_is_used() -> None:
    before = "import sys, surgery, surgery.cli; assert 'torch' not in sys.modules"
    code = f"{before}; surgery.testing.assert_equivalent; assert 'torch' in sys.modules; surgery.inject"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_help_answers_at_once() -> None:
    def once() -> float:
        """Seconds of a processor, which other work on the machine does not take: it waits for nothing else."""
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "surgery", "--help"], check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    once()  # compiles the files
    assert min(once() for _ in range(3)) < 0.2


def test_the_command_knows_its_version() -> None:
    assert version("model-surgery") == "0.1.0"
    reads, writes = {"inspect", "plan", "verify", "diff"}, {"merge", "unmerge", "combine", "extract", "export", "push"}
    assert set(command.commands) == {"demo"} | reads | writes


def test_inspect_lists_a_live_model_with_what_is_tied() -> None:
    embedding, head = torch.nn.Embedding(10, 4), torch.nn.Linear(4, 10, bias=False)
    head.weight = embedding.weight
    model = torch.nn.ModuleDict({"embed": embedding, "inner": torch.nn.Linear(4, 4), "head": head})
    model["again"] = model["inner"]
    rows = {row.name: (row.op, row.shape, row.size_bytes, row.tied) for row in surgery.inspect(model).rows}
    assert rows == {
        "embed": ("embedding", (10, 4), 160, "head"),
        "inner": ("linear", (4, 4), 80, "again"),
        "head": ("linear", (10, 4), 160, "embed"),
    }


def test_the_functions_take_no_compiler_of_torch_with_them() -> None:
    """It takes a second and 75 MB, and no command needs it."""
    told = "import sys, surgery.api.files, surgery.api.live; print('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", told], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "False"
