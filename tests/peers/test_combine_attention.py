"""combine over an attention layer, whose out_proj's delta counts twice when it is read."""

from pathlib import Path

import torch
from torch import nn

import surgery

EPS = torch.finfo(torch.float32).eps


def test_what_is_combined_alone_is_read_as_it_was(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("attn", nn.MultiheadAttention(8, 2))
    bare = {name: values.clone() for name, values in model.state_dict().items()}
    config = surgery.LoraConfig(r=4, lora_alpha=8, target_modules=["attn"], init_lora_weights=False)
    surgery.save(surgery.inject(model, config), tmp_path / "adapter")
    report = surgery.combine([tmp_path / "adapter"], tmp_path / "out")
    merged = []
    for folder in ("adapter", "out"):
        fresh = nn.Sequential()
        fresh.add_module("attn", nn.MultiheadAttention(8, 2))
        fresh.load_state_dict(bare)
        surgery.merge(surgery.load(fresh, tmp_path / folder))
        merged.append(surgery.eject(fresh, keep_merged=True).attn.out_proj.weight.detach())
    moved = (merged[0] - bare["attn.out_proj.weight"]).norm()
    assert moved > 0
    assert report.relative_error is not None
    assert report.relative_error <= EPS
    assert (merged[0] - merged[1]).norm() <= 4 * EPS * (moved + merged[0].norm())
