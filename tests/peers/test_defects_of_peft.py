"""The defects of peft 0.21.2 that are known to us, each with what becomes of it here and the test that shows it."""

from pathlib import Path
from typing import NamedTuple

import pytest

MERGES, MATCHING, LAYERS = (f"test_defects_in_{what}_of_peft" for what in ("merges", "matching", "layers"))
DIFFERENT, ROUNDING, REFUSED, RIGHT, NO_METHOD = "different", "rounding", "refused", "right here", "no method here"


class Defect(NamedTuple):
    """What `verify` says of what peft leaves on disk, or what surgery does; where no file tells, that alone."""

    here: str
    file: str
    test: str  # begins so


DEFECTS = {
    "a merge counts an attention layer's out_proj twice": Defect(DIFFERENT, MERGES, "a_merge_of_attention_counts"),
    "OFT over a convolution is no identity when fresh": Defect(NO_METHOD, LAYERS, "oft_over_a_convolution"),
    "one of two tied weights is merged": Defect(DIFFERENT, MERGES, "a_merge_into_one_of_two_tied"),
    "the factors of tied weights are merged twice": Defect(
        DIFFERENT, "test_tied_heads_of_peft", "a_merge_by_peft_adds"
    ),
    "a hot swap leaves alpha_pattern and rank_pattern out": Defect(RIGHT, LAYERS, "a_hot_swap_takes_the_alphas"),
    "safe merges have other bits": Defect(ROUNDING, MERGES, "merges_safe_or_not_with_factors"),
    "factors in another dtype merge to other bits": Defect(ROUNDING, MERGES, "merges_safe_or_not_with_factors"),
    "an unmerge does not give the weight back": Defect(RIGHT, MERGES, "peft_does_not_bring_back"),
    "tensors without a place are dropped": Defect(REFUSED, MATCHING, "a_tensor_that_finds_no_place"),
    "an entry that matches nothing goes unheard": Defect(REFUSED, MATCHING, "an_entry_that_matches_nothing"),
    "a merge that fails leaves half of it": Defect(RIGHT, MERGES, "a_merge_that_fails_leaves_all"),
    "RandLoRA saves its shared bases for every layer": Defect(NO_METHOD, LAYERS, "randlora_saves_its_shared"),
    "a bias over quantized layers is merged unscaled": Defect(RIGHT, LAYERS, "a_bias_over_a_quantized_layer"),
    "a safe merge into torchao lets NaN in": Defect(REFUSED, LAYERS, "a_safe_merge_into_torchao"),
    "rows of tokens drop a Linear's bias": Defect(RIGHT, "../procedures/test_token_rows", "a_bias_stays_where_rows"),
    "a start changes the base again at each load": Defect(DIFFERENT, MERGES, "a_start_that_changes_the_base"),
    "a merge of some adapters switches the others off": Defect(RIGHT, MERGES, "a_merge_of_one_of_two"),
    "an adapter combined alone is another": Defect(RIGHT, MERGES, "one_adapter_combined_alone"),
    "a whole name escapes layers_to_transform": Defect(REFUSED, MATCHING, "a_whole_name_escapes"),
    "a pattern leaves layers_to_transform unheard": Defect(REFUSED, "test_peft_files", "layers_that_would_go_unheard"),
    "a merge in a half type moves the factors": Defect(RIGHT, MERGES, "a_merge_of_attention_in_a_half_type"),
    "layers that share a weight are merged into it": Defect(REFUSED, MERGES, "layers_that_share_one_weight"),
    "dilation raises": Defect(RIGHT, LAYERS, "lora_over_a_convolution_with_gaps"),
    "padding modes go unheard": Defect(RIGHT, "test_convolutions_of_peft", "where_the_forward_of_peft_is_not"),
    "modules_to_save match any end": Defect(RIGHT, MATCHING, "modules_to_save_are_named_by_whole_parts"),
    "a method of Linear alone trains nothing elsewhere": Defect(NO_METHOD, LAYERS, "a_method_of_linear_layers_alone"),
}


@pytest.mark.parametrize("defect", DEFECTS.values(), ids=DEFECTS)
def test_each_is_shown_by_a_test(defect: Defect) -> None:
    told = (Path(__file__).parent / f"{defect.file}.py").read_text()
    assert told.count(f"\ndef test_{defect.test}") == 1
