"""Linears: the modules of a model that loaders look for where weights are quantized, by their names in memory."""

from typing import NamedTuple


class Linears(NamedTuple):
    """`quantized` are those that a loader takes for quantized ones unless it is told otherwise; `others` it may not."""

    quantized: frozenset[str]
    others: frozenset[str]
