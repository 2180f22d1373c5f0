"""fp8 and mxfp4 weights as transformers holds them, in what the table of codecs does not say of them."""

import pytest
import torch

from surgery.codecs import packed_of
from surgery.codecs.fp8_block import Fp8Block
from surgery.codecs.mxfp4 import Mxfp4
from surgery.errors import FormatError


def test_a_block_at_the_edge_is_cut_not_stretched():
    """192 rows in blocks of 128 are 128 and 64; by the scales' shape alone they would be 96 each."""
    weight = torch.ones(192, 128).to(torch.float8_e4m3fn)
    packed = packed_of({"weight": weight, "weight_scale_inv": torch.tensor([[1.0], [2.0]])}, "a test")
    assert Fp8Block().decode(packed, torch.float32)[:, 0].tolist() == [1.0] * 128 + [2.0] * 64


@pytest.mark.parametrize("config", [{}, {"weight_block_size": [128, 128]}])
def test_blocks_that_nothing_tells_or_that_contradict_what_is_told_are_refused(config):
    """3 x 5 scales of 48 x 70 codes are blocks of 16 x 16, of 16 x 14, and of others."""
    tensors = {"weight": torch.ones(48, 70).to(torch.float8_e4m3fn), "weight_scale_inv": torch.ones(3, 5)}
    with pytest.raises(FormatError, match="is weight_block_size of config"):
        packed_of(tensors, "a test", config)


def test_the_first_of_two_mxfp4_codes_is_the_low_half_of_the_byte():
    blocks = torch.full((1, 1, 1, 16), 0x21, dtype=torch.uint8)
    packed = packed_of({"blocks": blocks, "scales": torch.full((1, 1, 1), 127, dtype=torch.uint8)}, "a test")
    assert Mxfp4().decode(packed, torch.float32).flatten()[:2].tolist() == [0.5, 1.0]
