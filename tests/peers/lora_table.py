"""LoRA over every kind of layer, in each of its forms: the laws that test_lora_table holds, and docs/lora.md.

`python tests/peers/lora_table.py` writes the page. A new layer, or a new form, is a line of a table here.
"""

import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import peft
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import surgery
from surgery.errors import SurgeryError
from surgery.testing import assert_equivalent

PAGE = Path(__file__).parents[2] / "docs" / "lora.md"
WEIGHTS = "model.safetensors"


class Held(nn.Module):
    """A matrix, or a stack of them, that its module reads by itself."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.held = nn.Parameter(torch.randn(shape) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.held.mT


class Layer(NamedTuple):
    """A kind of layer, an input of it, and what else a config says of it."""

    made: Callable[[], nn.Module]
    given: Callable[[], Tensor]
    fields: Mapping[str, Any] = {"target_modules": ["layer"]}
    run: Callable[[nn.Module, Tensor], Any] = lambda module, x: module(x)


class Form(NamedTuple):
    """What a config says besides, and the kinds of layers that refuse it, each with what is said."""

    fields: Mapping[str, Any]
    refused: Mapping[str, str] = {}


PARAMETER = {"target_modules": [], "target_parameters": ["layer.held"]}
APART = {"target_modules": [], "target_parameters": [f"layer.{one}_proj_weight" for one in "qkv"]}
PARAMETERS = (
    "nn.Parameter of two axes",
    "nn.Parameter of three axes",
    "nn.MultiheadAttention with `kdim` and `vdim`, by `target_parameters`",
)
LAYERS: Mapping[str, Layer] = {
    "nn.Linear": Layer(lambda: nn.Linear(16, 12), lambda: torch.randn(64, 16)),
    "Conv1D of transformers": Layer(lambda: Conv1D(12, 16), lambda: torch.randn(64, 16)),
    "nn.Embedding": Layer(lambda: nn.Embedding(16, 12), lambda: torch.randint(0, 16, (64,))),
    "nn.Conv1d": Layer(lambda: nn.Conv1d(6, 12, 3, stride=2), lambda: torch.randn(16, 6, 9)),
    "nn.Conv2d": Layer(lambda: nn.Conv2d(6, 12, (2, 3), padding=1), lambda: torch.randn(8, 6, 5, 5)),
    "nn.Conv3d": Layer(lambda: nn.Conv3d(6, 12, 2), lambda: torch.randn(8, 6, 3, 3, 3)),
    "nn.MultiheadAttention": Layer(
        lambda: nn.MultiheadAttention(16, 2, batch_first=True),
        lambda: torch.randn(16, 4, 16),
        run=lambda module, x: module(x, x.flip(1), x, need_weights=False)[0],
    ),
    PARAMETERS[0]: Layer(lambda: Held(12, 16), lambda: torch.randn(64, 16), PARAMETER),
    PARAMETERS[1]: Layer(lambda: Held(3, 12, 16), lambda: torch.randn(3, 32, 16), PARAMETER),
    PARAMETERS[2]: Layer(
        lambda: nn.MultiheadAttention(16, 2, kdim=12, vdim=8, batch_first=True),
        lambda: torch.randn(16, 4, 16),
        APART,
        lambda module, x: module(x, x[..., :12], x[..., 8:], need_weights=False)[0],
    ),
}
FORMS: Mapping[str, Form] = {
    "LoRA": Form({}),
    "rsLoRA": Form({"use_rslora": True}),
    "DoRA": Form(
        {"use_dora": True},
        {"nn.MultiheadAttention": "DoRA is supported over"} | dict.fromkeys(PARAMETERS, "use_dora"),
    ),
    "`lora_bias`": Form(
        {"lora_bias": True},
        dict.fromkeys(("nn.Embedding", "nn.MultiheadAttention"), "lora_bias is supported over")
        | dict.fromkeys(PARAMETERS, "lora_bias"),
    ),
    "patterns": Form({"rank_pattern": {".*layer.*": 2}, "alpha_pattern": {".*layer.*": 7}}),
}
DTYPES = (torch.float32, torch.bfloat16)
UNABLE = (ValueError, TypeError, RuntimeError, AttributeError)  # what peft raises where it does not serve a layer


class Net(nn.Module):
    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.layer, self.run = layer.made(), layer.run
        self.head = nn.Linear(12, 16)  # without one, an embedding in files is taken for the output head too

    def forward(self, x: Tensor) -> Any:
        return self.run(self.layer, x)


class Cell:
    """One kind of layer under one form, in one dtype."""

    def __init__(self, layer: str, form: str, dtype: torch.dtype, folder: Path) -> None:
        self.layer, self.dtype, self.folder = LAYERS[layer], dtype, folder
        self.fields = {"r": 4, "lora_alpha": 6, **self.layer.fields, **FORMS[form].fields}
        torch.manual_seed(2)
        x = self.layer.given()
        self.x = x.to(dtype) if x.is_floating_point() else x

    def base(self) -> nn.Module:
        torch.manual_seed(0)
        return Net(self.layer).to(self.dtype).eval()

    def ours(self, fresh: bool = False) -> nn.Module:
        """With an adapter that is new, or random as if it were trained."""
        config = surgery.LoraConfig(**self.fields, init_lora_weights=fresh)
        return self._stirred(surgery.inject(self.base(), config).eval(), fresh)

    def theirs(self) -> nn.Module:
        """The same by peft."""
        config = peft.LoraConfig(**self.fields, init_lora_weights=False)
        return self._stirred(peft.get_peft_model(self.base(), config).eval(), fresh=False)

    def laid(self, folder: Path) -> nn.Module:
        return surgery.load(self.base(), folder).eval()

    def _stirred(self, model: nn.Module, fresh: bool) -> nn.Module:
        torch.manual_seed(1)
        for name, values in model.named_parameters():
            if not fresh and "lora_magnitude_vector" in name:  # which begins as the norms that change nothing
                values.data.mul_(torch.rand_like(values) + 0.5)
        return model


def fresh_changes_nothing(cell: Cell) -> None:
    before, after = cell.base()(cell.x), cell.ours(fresh=True)(cell.x)
    if cell.fields.get("use_dora"):  # scaled by a norm over itself: 1, but for its rounding
        assert_equivalent(cell.base(), cell.ours(fresh=True), cell.x)
    else:
        assert torch.equal(before, after)


def adapted_is_merged(cell: Cell) -> None:
    merged = surgery.eject(surgery.merge(cell.ours()), keep_merged=True)
    assert_equivalent(cell.ours(), merged, cell.x, base=cell.base())


def live_is_streaming(cell: Cell) -> None:
    base, adapter, out = (cell.folder / name for name in ("base", "adapter", "out"))
    base.mkdir()
    save_file(cell.base().state_dict(), base / WEIGHTS)
    surgery.save(cell.ours(), adapter)
    surgery.merge_checkpoint(base, adapter, out, reversible=True)
    streamed = load_file(out / WEIGHTS)
    live = surgery.eject(surgery.merge(cell.laid(adapter)), keep_merged=True).state_dict()
    assert live.keys() == streamed.keys()
    assert all(torch.equal(live[name], streamed[name]) for name in live)
    assert not all(torch.equal(values, streamed[name]) for name, values in cell.base().state_dict().items())
    surgery.unmerge_checkpoint(out, cell.folder / "back")
    assert (cell.folder / "back" / WEIGHTS).read_bytes() == (base / WEIGHTS).read_bytes()


def unmerged_is_what_was(cell: Cell) -> None:
    before, model = cell.base().state_dict(), cell.ours()
    held = {name: values.clone() for name, values in model.state_dict().items()}
    surgery.unmerge(surgery.merge(model))
    assert all(torch.equal(values, held[name]) for name, values in model.state_dict().items())
    after = surgery.eject(surgery.merge(model)).state_dict()
    assert all(torch.equal(values, before[name]) for name, values in after.items())


LAWS: Mapping[str, Callable[[Cell], None]] = {
    "fresh changes nothing": fresh_changes_nothing,
    "adapted is merged": adapted_is_merged,
    "live is streaming, and undone": live_is_streaming,
    "unmerged is what was": unmerged_is_what_was,
}


def by_peft(cell: Cell) -> str:
    """What peft makes of the cell, and whether each reads the other's files to the same outputs."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = cell.theirs()
            theirs(cell.x)
    except UNABLE as error:
        return f"raises {type(error).__name__}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(cell.folder / "theirs")
        here = cell.laid(cell.folder / "theirs")
        assert_equivalent(here, theirs, cell.x, base=cell.base())
        surgery.save(cell.ours(), cell.folder / "ours")
        there = peft.PeftModel.from_pretrained(cell.base(), cell.folder / "ours").eval()
        assert_equivalent(cell.ours(), there, cell.x, base=cell.base())
    return "the same outputs, both ways"


def refusal(cell: Cell) -> str:
    """What is said of a cell that is none."""
    try:
        cell.ours()
    except SurgeryError as error:
        return str(error)
    raise AssertionError("it is not refused")


def row(layer: str, form: str) -> list[str]:
    """A line of the page."""
    said = FORMS[form].refused.get(layer)
    cells = []
    with tempfile.TemporaryDirectory() as name:
        made = [Cell(layer, form, dtype, Path(name, str(dtype))) for dtype in DTYPES]
        for cell in made:
            cell.folder.mkdir()
            for law in () if said else LAWS.values():
                law(cell)
            cells.append("refused" if said and refusal(cell) else "yes")
        theirs = dict.fromkeys(by_peft(cell) for cell in made) if not said else [_alone(made[0])]
    return [layer, form, *cells, "; ".join(theirs)]


def _alone(cell: Cell) -> str:
    """What peft does where surgery refuses."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            cell.theirs()(cell.x)
    except UNABLE as error:
        return f"raises {type(error).__name__}"
    return "runs"


def page() -> str:
    """The whole page."""
    columns = ("layer", "form", *(str(dtype).removeprefix("torch.") for dtype in DTYPES), f"peft {peft.__version__}")
    rows = [row(layer, form) for layer in LAYERS for form in FORMS]
    table = "\n".join(f"| {' | '.join(line)} |" for line in (columns, ["---"] * len(columns), *rows))
    return f"""# LoRA, layer by layer

Where a cell says yes, a fresh adapter leaves the outputs as they are; the adapted layer gives the outputs of the merged
one; a live merge has the bytes of a streaming one, and both are undone to the bit; and peft, where it runs too, gives
the same outputs from files that either has written. Outputs are compared by `surgery.testing.assert_equivalent`. What
is refused is a clear error before anything is changed.

{table}

Written by `python tests/peers/lora_table.py`.
"""


if __name__ == "__main__":
    PAGE.write_text(page())
