"""What a model with an adapter is for, and what PEFT saves whole for it."""

from collections.abc import Mapping
from enum import StrEnum


class TaskType(StrEnum):
    """What a model with an adapter is for, as PEFT names it: `task_type` of a config takes these, or their names.

    >>> TaskType.CAUSAL_LM == "CAUSAL_LM"
    True
    """

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


# What PEFT itself puts into modules_to_save for a task, whether or not the model has it.
TASK_HEADS: Mapping[str, frozenset[str]] = {
    "SEQ_CLS": frozenset({"classifier", "score"}),
    "TOKEN_CLS": frozenset({"classifier", "score"}),
    "QUESTION_ANS": frozenset({"qa_outputs"}),
}
