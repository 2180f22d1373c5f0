"""Calibration: inputs that a model was seen to get tell feedback which errors matter."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_folders import file_hashes, read_tensors, tensor_hashes
from quantized_folders import SHAPES, SITES, quantized_base
from safetensors.torch import load_file, save_file
from test_into import adapter, factors, plain_base
from torch import Tensor, nn

import surgery
from surgery import FormatError, MatchError, ShapeError, StateError, UsageError, ValueRangeError
from surgery.core.arithmetic import exact_product

__all__ = ["adapter"]

EVA = surgery.LoraConfig(r=2, target_modules=["q", "up"], init_lora_weights="eva")
ANY: dict[str, Any] = {"min_retained": 0.0, "max_noise": math.inf}


def second_moment(inputs: Tensor) -> Tensor:
    wide = inputs.double()
    return wide.T @ wide / len(wide)


def inputs_of(site: str, count: int = 24) -> Tensor:
    """Along few directions, as activations are."""
    columns, drawn = SHAPES[site.rpartition(".")[2]][1], torch.Generator().manual_seed(len(site))
    few = torch.randn(count, 4, generator=drawn) @ torch.randn(4, columns, generator=drawn)
    return few + torch.randn(count, columns, generator=drawn) / 16


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    path = tmp_path / "inputs.safetensors"
    save_file({f"{site}.inputs": inputs_of(site) for site in SITES}, path)
    return path


@pytest.mark.parametrize("into", ["keep", "nf4"])
def test_the_error_of_outputs_is_smaller_it_is_verified_told_and_undone(
    into: str, adapter: Path, recorded: Path, tmp_path: Path
):
    base = plain_base(tmp_path / "base") if into != "keep" else quantized_base(tmp_path / "base", "nf4")
    options = {"into": into, "rounding": "feedback", "reversible": True, **ANY}
    receipt = surgery.merge_checkpoint(base, adapter, tmp_path / "out", calibration=recorded, **options).receipt
    surgery.merge_checkpoint(base, adapter, tmp_path / "blind", **options)
    surgery.merge_checkpoint(base, adapter, tmp_path / "exact", into="16bit" if into == "keep" else None)
    for site in SITES:
        exact = plain(tmp_path / "exact", site)
        seen, blind = (
            float(((plain(tmp_path / one, site) - exact) @ inputs_of(site).double().T).norm())
            for one in ("out", "blind")
        )
        assert seen < blind / 2
    assert list(receipt["options"]["calibration"]) == ["inputs.safetensors"]
    assert "4 of 4 adapted weights are rounded with feedback, 4 of them by calibration inputs" in receipt["notes"]
    assert surgery.verify_checkpoint(base, adapter, tmp_path / "out", calibration=recorded).counts["bits"] == len(SITES)
    with pytest.raises(UsageError, match=r"by calibration inputs of inputs\.safetensors; give `calibration`"):
        surgery.verify_checkpoint(base, adapter, tmp_path / "out")
    surgery.unmerge_checkpoint(tmp_path / "out", tmp_path / "back")
    assert file_hashes(tmp_path / "back") == file_hashes(base)


def plain(folder: Path, site: str) -> Tensor:
    from surgery.codecs import codec_of
    from surgery.hosts.checkpoint import Checkpoint

    with Checkpoint(folder) as found:
        packed = found.load(next(one for one in found.sites() if one.name == site))
        return codec_of(packed, site).decode(packed, torch.float64)


def test_tiles_change_no_bit(adapter: Path, recorded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    base = quantized_base(tmp_path / "base", "nf4")
    options = {"into": "keep", "rounding": "feedback", "calibration": recorded, **ANY}
    surgery.merge_checkpoint(base, adapter, tmp_path / "whole", **options)
    monkeypatch.setattr("surgery.procedures.planning.feeding.FED_ELEMENTS", 1)
    monkeypatch.setattr("surgery.core.source.TILE_ELEMENTS", 1)
    surgery.merge_checkpoint(base, adapter, tmp_path / "rows", **options)
    assert tensor_hashes(read_tensors(tmp_path / "rows")) == tensor_hashes(read_tensors(tmp_path / "whole"))


def test_probes_are_such_inputs(adapter: Path, recorded: Path, tmp_path: Path):
    base, count = quantized_base(tmp_path / "base", "nf4"), 4096
    options = {"into": "keep", "rounding": "feedback", "calibration": recorded, "probes": count, **ANY}
    receipt = surgery.merge_checkpoint(base, adapter, tmp_path / "out", **options).receipt
    given = factors()
    for site in SITES:
        before, after = plain(base, site), plain(tmp_path / "out", site)
        delta = exact_product(given[f"{site}.lora_B.weight"], given[f"{site}.lora_A.weight"]) * (6 / 4)
        H = second_moment(inputs_of(site))
        H += 0.01 * H.diagonal().mean() * torch.eye(len(H))
        error = after - before - delta
        wanted = math.sqrt(float((error @ H * error).sum() / (delta @ H * delta).sum()))
        # Of the mean of as many squares as there are inputs, 4 standard deviations, in both sums; few directions count.
        assert receipt["changed"][f"{site}.weight"]["output_error"] == pytest.approx(
            wanted, rel=8 * math.sqrt(2 / count)
        )


@pytest.mark.parametrize(
    ("tensors", "error", "why"),
    [
        ({"model.layers.0.q_proj.inputs": torch.ones(3, 71)}, ShapeError, "the module has 70 inputs"),
        ({"layers.0.q_proj.inputs": torch.ones(3, 70)}, MatchError, r"nearest: layers\.0\.q_proj"),
        ({"model.layers.0.q_proj.inputs": torch.ones(513, 70)}, FormatError, "up to 512 inputs"),
        ({"model.layers.0.q_proj.inputs": torch.full((3, 70), torch.nan)}, ValueRangeError, "holds NaN"),
        ({"model.layers.0.q_proj": torch.ones(3, 70)}, FormatError, r"NAME\.inputs"),
        ({"a.inputs": torch.ones(3, 70), "b.rest": torch.ones(70)}, FormatError, r"b\.inputs is not there"),
        ({"a.inputs": torch.ones(3, 70), "a.rest": torch.ones(71)}, FormatError, r"a\.inputs is \[3, 70\]"),
    ],
)
def test_other_files_are_refused(tensors: Any, error: Any, why: str, adapter: Path, tmp_path: Path):
    base, path = quantized_base(tmp_path / "base", "nf4"), tmp_path / "inputs.safetensors"
    save_file(tensors, path)
    with pytest.raises(error, match=why):
        surgery.merge_checkpoint(
            base, adapter, tmp_path / "out", into="keep", rounding="feedback", calibration=path, **ANY
        )


def test_it_is_for_feedback_alone(adapter: Path, recorded: Path, tmp_path: Path):
    base = quantized_base(tmp_path / "base", "nf4")
    with pytest.raises(UsageError, match="is for `rounding=feedback`"):
        surgery.merge_checkpoint(base, adapter, tmp_path / "out", into="keep", calibration=recorded)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.up = nn.Linear(70, 48), nn.Linear(48, 33)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:  # noqa: ARG002  # as models have it
        out: Tensor = self.up(self.q(x))
        return out


def test_what_is_recorded_has_the_second_moment_of_the_inputs_in_few_rows(tmp_path: Path):
    torch.manual_seed(0)
    net, few = Net(), torch.randn(40, 3, 6) @ torch.randn(6, 70)
    report = surgery.record_inputs(net, few.split(8), tmp_path / "out", rank=8)
    assert report.counts == {"q": 120, "up": 120}
    found = load_file(tmp_path / "out" / "calibration.safetensors")
    assert found["q.inputs"].shape[0] <= 8
    wanted = second_moment(few.flatten(0, 1))
    room = 70 * torch.finfo(torch.float32).eps * float(wanted.abs().max())  # as written
    assert float((second_moment(found["q.inputs"]) + found["q.rest"].diag() - wanted).abs().max()) < room
    spread = net.q(few).detach().flatten(0, 1)
    energy = second_moment(found["up.inputs"]).diagonal() + found["up.rest"]
    assert torch.allclose(energy, second_moment(spread).diagonal(), rtol=70 * torch.finfo(torch.float32).eps)


def test_padding_is_no_input_and_wrappers_have_the_names_of_what_they_wrap(tmp_path: Path):
    torch.manual_seed(0)
    net, x = Net(), torch.randn(4, 5, 70)
    mask = torch.ones(4, 5)
    mask[:, 3:] = 0
    surgery.record_inputs(net, [x[:, :3]], tmp_path / "alone", targets=["q"])
    surgery.inject(net, surgery.LoraConfig(r=2, target_modules=["q"]))
    report = surgery.record_inputs(net, [{"x": x, "attention_mask": mask}], tmp_path / "padded", targets=["q"])
    assert report.counts == {"q": 12}
    found, wanted = (load_file(tmp_path / one / "calibration.safetensors") for one in ("padded", "alone"))
    assert tensor_hashes(found) == tensor_hashes(wanted)


class Flat(Net):
    """Drops out in training, and joins rows as layers of experts do."""

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return super().forward(nn.functional.dropout(x, 0.5, self.training).flatten(0, 1), attention_mask)


def test_dropout_does_not_act_and_padding_is_left_out_where_rows_are_joined(tmp_path: Path):
    torch.manual_seed(0)
    net, x, mask = Flat().train(), torch.randn(4, 5, 70), torch.ones(4, 5)
    mask[:, 3:] = 0
    surgery.record_inputs(net, [x[:, :3]], tmp_path / "alone", targets=["q"])
    report = surgery.record_inputs(net, [{"x": x, "attention_mask": mask}], tmp_path / "padded", targets=["q"])
    assert report.counts == {"q": 12}
    assert net.training
    found = load_file(tmp_path / "alone" / "calibration.safetensors")
    wanted, inputs = second_moment(x[:, :3].flatten(0, 1)), second_moment(found["q.inputs"])
    room = 70 * torch.finfo(torch.float32).eps * float(wanted.abs().max())
    assert float((inputs + found["q.rest"].diag() - wanted).abs().max()) < room
    both = (load_file(tmp_path / one / "calibration.safetensors") for one in ("padded", "alone"))
    assert len({tuple(tensor_hashes(one).items()) for one in both}) == 1


def test_batches_are_called_as_examples_are(tmp_path: Path):
    x, mask = torch.randn(2, 3, 70), torch.ones(2, 3)
    assert surgery.record_inputs(Net(), [(x, mask), [x]], tmp_path / "out").counts == {"q": 12, "up": 12}
    for batches in (x, {"x": x}, "x"):
        with pytest.raises(UsageError, match="put a single one into a list"):
            surgery.record_inputs(Net(), batches, tmp_path / "other")
    ran = []
    with pytest.raises(surgery.OutputExistsError):
        surgery.record_inputs(Net(), (ran.append(x) or x for _ in "ab"), tmp_path / "out")
    assert not ran
    for rank in (0, 2.0, "4", True):
        with pytest.raises(UsageError, match="a whole number from 1 to 512"):
            surgery.record_inputs(Net(), [x], tmp_path / "other", rank=rank)


def test_nothing_to_record_is_refused(tmp_path: Path):
    with pytest.raises(MatchError, match="targets"):
        surgery.record_inputs(Net(), [torch.randn(2, 70)], tmp_path / "out", targets=["k"])
    with pytest.raises(UsageError, match="no linear layer was called"):
        surgery.record_inputs(Net(), [], tmp_path / "out")
    with pytest.raises(ValueRangeError, match="q: it gets NaN"):
        surgery.record_inputs(Net(), [torch.full((2, 70), torch.nan)], tmp_path / "out")
    with pytest.raises(ValueRangeError, match=r"q: it gets inputs of 1e\+200; such up to 9.22e\+18 are wanted"):
        surgery.record_inputs(Net().double(), [torch.full((2, 70), -1e200, dtype=torch.float64)], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "ask",
    [
        lambda net, out: surgery.record_inputs(net, [torch.ones(2, 70)], out),
        lambda net, _: surgery.inject(net, EVA, examples=[torch.ones(2, 70)]),
    ],
    ids=["record_inputs", "eva"],
)
def test_a_model_without_weights_cannot_be_run(ask: Callable[[nn.Module, Path], object], tmp_path: Path):
    net = Net()
    net.up.to("meta")
    with pytest.raises(StateError, match=r"up\.weight: it is on the meta device, .* give the model its weights"):
        ask(net, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_inputs_are_recorded_up_to_the_largest_whose_squares_are_written(tmp_path: Path):
    x = torch.full((2, 70), 2.0**63, dtype=torch.float64)
    x[1, ::2] = 0
    surgery.record_inputs(Net().double(), [x], tmp_path / "out", targets=["q"], rank=1)
    held = load_file(tmp_path / "out" / "calibration.safetensors")
    assert all(bool(values.isfinite().all()) for values in held.values())
    found = second_moment(held["q.inputs"]).diagonal() + held["q.rest"].double()
    torch.testing.assert_close(found, second_moment(x).diagonal(), rtol=70 * torch.finfo(torch.float32).eps, atol=0.0)


def test_a_live_merge_takes_what_was_recorded_of_the_model(tmp_path: Path):
    torch.manual_seed(0)
    net, x = Net(), torch.randn(64, 4) @ torch.randn(4, 70)
    surgery.record_inputs(net, [x], tmp_path / "inputs")
    (tmp_path / "base").mkdir()
    save_file(net.state_dict(), tmp_path / "base" / "model.safetensors")
    surgery.inject(net, surgery.LoraConfig(r=4, target_modules=["q", "up"], init_lora_weights=False))
    surgery.save(net, tmp_path / "adapter")
    options = {"into": "nf4", "rounding": "feedback", "calibration": tmp_path / "inputs", **ANY}
    surgery.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", **options)
    written = read_tensors(tmp_path / "out")
    surgery.merge(net, **options)
    assert torch.equal(net.q.base_layer.weight.flatten(), written["q.weight"].flatten())
    assert torch.equal(net.up.base_layer.weight.flatten(), written["up.weight"].flatten())
