"""What a quantization_config of compressed-tensors says of weights, and what of it is not supported."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from surgery.errors import FormatError, printable

METHOD = "compressed-tensors"
FORMATS = (
    *("pack-quantized", "int-quantized", "float-quantized", "naive-quantized"),
    *("nvfp4-pack-quantized", "mxfp4-pack-quantized"),
)
_NONE = ("dense", "mixed-precision")  # no layer is packed so; each group tells its own
_TOKENS: Mapping[str, Any] = {"num_bits": 8, "strategy": "token", "symmetric": True, "dynamic": True}
_COMPRESSED = (None, "compressed")
_PLAIN = "load it with transformers and dequantize=True, and save it plainly"


def told_values(config: Mapping[str, Any], key: str, form: str) -> list[Any]:
    """What the groups of layers say of their weights by `key`; only those in this form, where they tell theirs.

    The settings of a weight, which have no groups, say it themselves.
    """
    groups = [one for one in _groups(config) if one.get("format") in (None, form)]
    args = [one["weights"] for one in groups if isinstance(one.get("weights"), dict)]
    return [one[key] for one in [*args, config] if one.get(key) is not None]


def told_of(
    form: str, weights: Mapping[str, Any], plainly: Sequence[str], inputs: Mapping[str, Any] | None = None
) -> Mapping[str, Any]:
    """What it says where all linear layers but those of `plainly` are held alike, and run on `inputs` as they are told.

    None are inputs as they come.
    """
    group: dict[str, Any] = {"targets": ["Linear"], "weights": {"dynamic": False, **weights}, "format": form}
    group |= {"input_activations": inputs, "output_activations": None}
    return {
        "quant_method": METHOD,
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": list(plainly),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def tokens_of(kind: str) -> Mapping[str, Any]:
    """Inputs in 8 bits, "int" or "float", by a scale for each token that is found as it runs."""
    return {**_TOKENS, "type": kind}


def refuse_unsupported(config: Mapping[str, Any]) -> None:
    """FormatError, with the next step, where the quantization_config asks for what no codec here does."""
    for found, why in _unsupported(config):
        if found:
            raise FormatError(f"compressed-tensors {why} is not supported; {_PLAIN}")


def _unsupported(config: Mapping[str, Any]) -> Iterator[tuple[bool, str]]:
    sparsity, status = config.get("sparsity_config") or {}, config.get("quantization_status")
    sparse = sparsity.get("format") if isinstance(sparsity, dict) else sparsity
    yield sparse not in (None, "dense"), f"sparsity {printable(sparse)}"
    yield bool(config.get("kv_cache_scheme")), "quantization of the KV cache (kv_cache_scheme)"
    yield bool(config.get("transform_config")), "rotation of weights (transform_config)"
    yield status not in _COMPRESSED, f"quantization_status {printable(status)}, of weights that are not packed yet,"
    for held in [config, *_groups(config)]:
        form = held.get("format")
        yield form is not None and form not in FORMATS + _NONE, f"format {printable(form)}"
    for group in _groups(config):
        weights = group.get("weights")
        yield not isinstance(weights, dict), "quantization of activations alone"
        order = weights.get("actorder") if isinstance(weights, dict) else None
        yield order in (True, "group", "dynamic"), f"actorder {printable(order)}, with columns out of order,"


def _groups(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    told = config.get("config_groups")
    for group in told.values() if isinstance(told, dict) else ():
        if isinstance(group, dict):
            yield group
