"""Graphs over the codes of bitsandbytes: each weight is decoded as its codec does."""

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

import surgery
from surgery.codecs.bnb4 import Bnb4
from surgery.codecs.bnb8 import Bnb8
from surgery.core.codec import Codec, Packed
from surgery.formats.onnx.example import example_of
from surgery.formats.onnx.runtime import check, run
from surgery.hosts.twin import weightless
from surgery.io.staging import Staging
from surgery.procedures.exports.export import AnyModule, Manner, traced, write_graph
from surgery.procedures.exports.stored_tensors import write_state

INPUTS = 70  # no whole blocks
CASES = [
    (Bnb4(), {"quant_type": kind, "blocksize": size, "double_quant": double}, outputs)
    for kind, size, double, outputs in [
        *(("nf4", 32, False, 32), ("nf4", 64, True, 33), ("nf4", 256, False, 5), ("nf4", 4096, False, 3)),
        *(("fp4", 64, False, 33), ("fp4", 128, True, 64), ("fp4", 512, True, 33)),
    ]
] + [(Bnb8(), {}, 33)]
WIDE = 64  # of so many outputs the codes lie in elements of two bytes
NATIVE = sum(settings.get("blocksize", 4096) <= 256 for _, settings, _ in CASES)


class Layers(nn.Module):
    """Each is given a matrix, and a batch of one; the sums are of the weight itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Linear(INPUTS, outputs, bias=i % 2 == 1) for i, (_, _, outputs) in enumerate(CASES)
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        found = {}
        for i, layer in enumerate(self.layers):
            found |= {f"{i}.flat": layer(x), f"{i}.batch": layer(x[None])[0]}
        return found | {"used": self.layers[0].weight * 2}


def packed(codec: Codec, settings: dict[str, Any], outputs: int) -> Packed:
    weight = torch.randn(outputs, INPUTS, generator=torch.Generator().manual_seed(outputs))
    held = codec.fresh(weight, settings)
    if outputs != WIDE:
        return held
    return held._replace(tensors={**held.tensors, "weight": held.tensors["weight"].flatten().view(torch.bfloat16)})


def exported(out: Path, how: Manner) -> tuple[Path, dict[str, Tensor]]:
    """A graph over quantized layers, and what they give for the unit matrix."""
    module, state = Layers(), {}
    example = example_of(module, torch.eye(INPUTS), None)
    wanted: dict[str, Tensor] = {}
    for i, (codec, settings, outputs) in enumerate(CASES):
        held, site = packed(codec, settings, outputs), f"layers.{i}"
        state |= {site + codec.endings[role]: values for role, values in held.tensors.items()}
        weight = codec.decode(held, torch.float32)
        bias = torch.zeros(outputs) if i % 2 else None
        state |= {} if bias is None else {f"{site}.bias": bias}
        wanted |= {f"{i}.flat": weight.T, f"{i}.batch": weight.T} | ({"used": weight * 2} if i == 0 else {})
    with Staging(out) as staging:
        write_state(staging, state)
        plain = weightless(module)
        write_graph(traced(plain, example), plain.module, AnyModule(), staging, how)
    return out / "model.onnx", wanted


@pytest.mark.parametrize("how", [Manner(), Manner(weights="copy"), Manner(portable=True)], ids=["", "copy", "portable"])
def test_a_graph_decodes_4_bits_as_their_codec_does_to_the_bit(how: Manner, tmp_path: Path) -> None:
    """int8 within the roundings of two products in either order."""
    graph, wanted = exported(tmp_path / "out", how)
    check(graph)
    found = run(graph, [{"x": torch.eye(INPUTS)}])[0]
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        if name.startswith(f"{len(CASES) - 1}."):
            eps = torch.finfo(torch.float32).eps
            assert bool(((found[name] - values).abs() <= 2 * eps * values.abs()).all())
        else:
            assert torch.equal(found[name], values), name
    ops = [node.op_type for node in onnx.load(graph, load_external_data=False).graph.node]
    assert ops.count("MatMulBnb4") == (0 if how.portable else 2 * NATIVE)
    assert ops.count("DequantizeLinear") == 1
    if not how.portable:
        assert ops.count("MatMul") + ops.count("Gemm") == 2 * (len(CASES) - NATIVE)


def test_a_graph_has_no_codes_of_its_own(tmp_path: Path) -> None:
    graph, _ = exported(tmp_path / "out", Manner())
    told = onnx.load(graph, load_external_data=False).graph.initializer
    places = {one.name: {entry.key: entry.value for entry in one.external_data} for one in told if one.external_data}
    beside = {name for name, place in places.items() if place["location"] == "model.onnx.data"}
    doubled = [i for i, (_, settings, _) in enumerate(CASES) if settings.get("double_quant")]
    assert beside == {f"weights/layers.{i}.weight.absmax.float32" for i in doubled}
    assert {f"weights/layers.{i}.weight" for i in range(len(CASES))} <= places.keys()
    assert max(len(one.raw_data) for one in told if not one.external_data) <= 256 * 2 * 4  # values of the pairs


def test_other_codes_are_refused_by_name(tmp_path: Path) -> None:
    codes, module = torch.zeros(4, 8).to(torch.float8_e4m3fn), nn.Linear(8, 4, bias=False)
    plain = weightless(module)
    graph = traced(plain, example_of(module, torch.ones(1, 8), None))
    wrong = pytest.raises(surgery.FormatError, match=r"^0\.weight: held as fp8_block.*export it into 16bit")
    with wrong, Staging(tmp_path / "out") as staging:
        write_state(staging, {"0.weight": codes, "0.weight_scale_inv": torch.ones(1, 1)})
        write_graph(graph, plain.module, AnyModule(), staging, Manner())
    assert list(tmp_path.iterdir()) == []
