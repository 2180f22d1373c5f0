"""LoRA over every kind of layer, in each of its forms: the laws that test_lora_table holds, and docs/lora.md.

`python tests/peers/lora_table.py` writes the page. The layers and forms stand in lora_forms.py.
"""

import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from lora_forms import FORMS, LAYERS
from safetensors.torch import load_file, save_file
from torch import nn

import surgery
from surgery.errors import MatchError, SurgeryError
from surgery.testing import assert_equivalent

PAGE = Path(__file__).parents[2] / "docs" / "lora.md"
WEIGHTS, TENSORS = "model.safetensors", "adapter_model.safetensors"


DTYPES = (torch.float32, torch.bfloat16)
WITHOUT_MERGE = "yes, not merged"
UNABLE = (ValueError, TypeError, RuntimeError, AttributeError)  # what peft raises where it does not serve a layer


class Cell:
    """One kind of layer under one form, in one dtype."""

    def __init__(self, layer: str, form: str, dtype: torch.dtype, folder: Path) -> None:
        self.layer, self.form, self.dtype, self.folder = LAYERS[layer], FORMS[form], dtype, folder
        self.fields = {"r": 4, "lora_alpha": 6, **self.layer.fields, **FORMS[form].fields}
        torch.manual_seed(2)
        x = self.layer.given()
        self.x = x.to(dtype) if x.is_floating_point() else x

    def base(self) -> nn.Module:
        torch.manual_seed(0)
        return self.form.net(self.layer).to(self.dtype).eval()

    def ours(self, fresh: bool = False) -> nn.Module:
        """With an adapter that is new, or random as if it were trained."""
        config = surgery.LoraConfig(**self.fields, init_lora_weights=self.form.start or fresh)
        return self._stirred(surgery.inject(self.base(), config, **self._examples).eval(), fresh)

    def theirs(self) -> nn.Module:
        """The same by peft."""
        config = peft.LoraConfig(**self.fields, init_lora_weights=self.form.start or False)
        base = self.base()
        if self.form.seen is not None:
            self.form.seen(base, config, self.x)
        model = peft.get_peft_model(base, config).eval()
        if self.form.start:
            model.save_pretrained(self.folder / "initial")
        return self._stirred(model, fresh=False)

    def saved(self, theirs: nn.Module) -> Path:
        """Where peft has saved a model of its own; converted, where it starts as a part of the base."""
        initial = {"path_initial_model_for_weight_conversion": self.folder / "initial"} if self.form.start else {}
        theirs.save_pretrained(self.folder / "theirs", **initial)
        return self.folder / "theirs"

    def bare(self) -> nn.Module:
        """Without an adapter, over what one would be laid."""
        model = self.ours(fresh=True)
        surgery.disable_adapters(model)
        return model

    def laid(self, folder: Path) -> nn.Module:
        return surgery.load(self.base(), folder).eval()

    def _stirred(self, model: nn.Module, fresh: bool) -> nn.Module:
        torch.manual_seed(1)
        for values in model.parameters() if self.form.start or not self._drawn else ():
            if values.requires_grad and not fresh:  # what begins as the base has it, or as a part of that
                values.data.mul_(torch.rand_like(values) + 0.5)
        return model

    @property
    def _examples(self) -> dict[str, Any]:
        """Those that a form starts from."""
        if self.form.seen is None:
            return {}
        return {"examples": [self.x]} | ({} if self.form.loss is None else {"loss": self.form.loss})

    @property
    def _drawn(self) -> bool:
        """Are all tensors of an adapter random from the start, where init_lora_weights is False?"""
        return not {"use_dora", "bias", "trainable_token_indices"} & self.fields.keys()


def fresh_changes_nothing(cell: Cell) -> None:
    if cell.form.start or "use_dora" in cell.fields:  # by a difference, or a factor of 1, that are rounded
        assert_equivalent(cell.bare(), cell.ours(fresh=True), cell.x)
    else:
        assert torch.equal(cell.bare()(cell.x), cell.ours(fresh=True)(cell.x))
    if not cell.form.unmerged:
        assert torch.equal(cell.bare()(cell.x), cell.base()(cell.x))


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
    assert all(torch.equal(live[name].cpu(), streamed[name]) for name in live)
    assert not all(torch.equal(values.cpu(), streamed[name]) for name, values in cell.base().state_dict().items())
    surgery.unmerge_checkpoint(out, cell.folder / "back")
    assert (cell.folder / "back" / WEIGHTS).read_bytes() == (base / WEIGHTS).read_bytes()


def unmerged_is_what_was(cell: Cell) -> None:
    before, model = cell.base().state_dict(), cell.ours()
    held = {name: values.clone() for name, values in model.state_dict().items()}
    surgery.unmerge(surgery.merge(model))
    assert all(torch.equal(values, held[name]) for name, values in model.state_dict().items())
    after = surgery.eject(surgery.merge(model)).state_dict()
    assert all(torch.equal(values, before[name]) for name, values in after.items())


def a_merge_is_refused(cell: Cell) -> None:
    model = cell.ours()
    surgery.save(model, cell.folder / "adapter")
    (cell.folder / "base").mkdir()
    save_file(cell.base().state_dict(), cell.folder / "base" / WEIGHTS)
    with pytest.raises(MatchError, match=cell.form.unmerged):
        surgery.merge(model)
    with pytest.raises(MatchError, match=cell.form.unmerged):
        surgery.merge_checkpoint(cell.folder / "base", cell.folder / "adapter", cell.folder / "out")


MERGED: Mapping[str, Callable[[Cell], None]] = {
    "fresh changes nothing": fresh_changes_nothing,
    "adapted is merged": adapted_is_merged,
    "live is streaming, and undone": live_is_streaming,
    "unmerged is what was": unmerged_is_what_was,
}
UNMERGED: Mapping[str, Callable[[Cell], None]] = {
    "fresh changes nothing": fresh_changes_nothing,
    "a merge is refused": a_merge_is_refused,
}


def laws_of(form: str) -> Mapping[str, Callable[[Cell], None]]:
    return UNMERGED if FORMS[form].unmerged else MERGED


def by_peft(cell: Cell) -> str:
    """What peft makes of the cell; wherever it runs, each reads the other's files to the same outputs."""
    with cell.form.peft(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made, reads = _made(cell), _reads(cell)
    if made == reads == "":
        return "the same outputs, both ways"
    return f"{made}; reads ours to the same outputs" if not reads else made


def _made(cell: Cell) -> str:
    """Why peft makes none of its own, or nothing: its files are read here to its outputs."""
    try:
        theirs = cell.theirs()
        theirs(cell.x)
        folder = cell.saved(theirs)
    except UNABLE as error:
        return f"raises {type(error).__name__}"
    if not load_file(folder / TENSORS):
        return "saves nothing of it"
    assert_equivalent(cell.laid(folder), theirs, cell.x, base=cell.base())
    return ""


def _reads(cell: Cell) -> str:
    """Why peft cannot read ours, or nothing."""
    ours = cell.ours()
    surgery.save(ours, cell.folder / "ours")
    try:
        there = peft.PeftModel.from_pretrained(cell.base(), cell.folder / "ours").eval()
        there(cell.x)
    except UNABLE as error:
        return f"raises {type(error).__name__}"
    assert_equivalent(ours, there, cell.x, base=cell.base())
    return ""


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
            for law in () if said else laws_of(form).values():
                law(cell)
            cells.append("refused" if said and refusal(cell) else WITHOUT_MERGE if FORMS[form].unmerged else "yes")
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

What a cell says:

- **yes**: a fresh adapter leaves the outputs as they are; the adapted layer gives the outputs of the merged one; a live
  merge has the bytes of a streaming one, and both are undone to the bit. peft, where it runs too, gives the same
  outputs from files that either has written.
- **not merged**: it runs, is trained and saved, and a merge is refused, which would change a weight that several
  layers share.
- **refused**: by a clear error, before anything is changed.

Outputs are compared by `surgery.testing.assert_equivalent`. QALoRA is compared with what peft makes of layers of GPTQ,
in whose place an nn.Linear stands; over other layers peft ignores `use_qalora`.

{table}

Written by `python tests/peers/lora_table.py`.
"""


if __name__ == "__main__":
    PAGE.write_text(page())
