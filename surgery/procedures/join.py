"""The join of an adapter's tensors to a checkpoint's sites: names, ops and shapes agree, or it is refused."""

from collections.abc import Iterator, Mapping
from itertools import chain

from torch import Tensor

from surgery.adapters.peft import check_shapes
from surgery.core.adapter import Adapter, Layer
from surgery.core.names import nearest, renaming
from surgery.core.op import Op
from surgery.core.site import RawDtype, Site
from surgery.errors import FormatError, InputError, MatchError, ShapeError, printable
from surgery.hosts.checkpoint import Checkpoint
from surgery.ops import OPS

# The families of transformers whose projections are stored transposed, and the names of those.
CONV1D_FAMILIES = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp", "clvp_decoder"})
CONV1D_NAMES = frozenset({"c_attn", "q_attn", "c_proj", "c_fc"})

EXPLAINED = 8  # of the sites that a base lacks; to find the nearest names takes time

_TYING = ("ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForConditionalGeneration", "ForPreTraining")


class Joined:
    """The layers that an adapter lays over a checkpoint's sites, and what was refused."""

    def __init__(self, base: Checkpoint, adapter: Adapter, weight: float) -> None:
        self.base, self.adapter, self.weight = base, adapter, weight
        self.known = {site.name: site for site in base.sites()}
        self.layers: dict[str, tuple[Site, Layer]] = {}
        self.refusals: list[InputError] = []
        names = {name for name, site in self.known.items() if "weight" in site.tensors}
        self.renamed = renaming(list(adapter.sites), names) or {name: name for name in adapter.sites}
        for name in sorted(adapter.sites):
            try:
                site, layer = self._one(name)
            except InputError as error:
                self.refusals.append(error)
            else:
                self.layers[site.name] = site, layer

    def _one(self, name: str) -> tuple[Site, Layer]:
        site = self.known.get(self.renamed[name])
        if site is None or "weight" not in site.tensors:
            raise MatchError(self._absent(name))
        _ = site.weight.torch_dtype  # a format that torch lacks is refused
        method = self.adapter.config.method(name)
        op = self._op(site, name)
        params = self.adapter.sites[name]
        site = site.with_op(op)
        wanted = {role: spec.shape for role, spec in method.tensors(site).items()}
        check_shapes(name, params, wanted, self.adapter.where)
        if op.name == "embedding" and ties_head(self.base, site):
            raise MatchError(
                f"{printable(name)}: this embedding is tied to the output head, which the checkpoint does not hold; "
                "a merge would change both; save the base with tie_word_embeddings=false first"
            )
        return site, Layer(method.weighted(self.weight), params)

    def _op(self, site: Site, name: str) -> Op:
        hint = self.adapter.ops.get(name)
        if len(site.weight.shape) != 2:
            raise ShapeError(
                f"{printable(name)}: its weight is {list(site.weight.shape)}; a matrix is wanted; "
                "this kind of layer is not supported yet"
            )
        if hint is not None:
            return OPS[hint]
        fits = [OPS[key] for key in ("linear", "conv1d") if self._fits(site, name, OPS[key])]
        if len(fits) < 2:
            return fits[0] if fits else OPS["linear"]
        return self._square(site, name)

    def _square(self, site: Site, name: str) -> Op:
        """The layout of a square weight, which no shape tells."""
        family = self.base.config.get("model_type")
        if family is not None:
            transposed = family in CONV1D_FAMILIES and site.name.rpartition(".")[2] in CONV1D_NAMES
            return OPS["conv1d" if transposed else "linear"]
        told = OPS["conv1d" if getattr(self.adapter.config, "fan_in_fan_out", False) else "linear"]
        for other, params in self.adapter.sites.items():
            there = self.known.get(self.renamed[other])
            shapes = {tuple(values.shape) for values in params.values()}
            if there is not None and len(shapes) == 2 and not self._fits(there, other, told):
                raise MatchError(
                    f"{printable(name)}: its weight is square, fan_in_fan_out says {told.name}, and "
                    f"{printable(other)} is not; put the model's config.json beside the weights"
                )
        return told

    def _fits(self, site: Site, name: str, op: Op) -> bool:
        if "weight" not in site.tensors or len(site.weight.shape) != 2 or name in self.adapter.ops:
            return name in self.adapter.ops
        specs = self.adapter.config.method(name).tensors(site.with_op(op))
        return all(tuple(self.adapter.sites[name][role].shape) == spec.shape for role, spec in specs.items())

    def _absent(self, name: str) -> str:
        told = f"{printable(self.adapter.where)}: {printable(name)} is not in the base"
        if len(self.refusals) >= EXPLAINED:
            return told
        close = ", ".join(printable(other) for other in nearest(name, self.known))
        return (
            f"{told}; nearest there: {close}; "
            "is this the adapter's base? An absent output head is tied to the embedding"
        )


def ties_head(base: Checkpoint, embedding: Site) -> bool:
    """Whether the model has an output head, and no tensor for it is here: it is the embedding's."""
    architecture = str((base.config.get("architectures") or ["ForCausalLM"])[0])
    others = (info for info in base.tensors() if info.name != embedding.weight.name and not _in_layer(info.name))
    return architecture.endswith(_TYING) and all(info.shape != embedding.weight.shape for info in others)


def _in_layer(name: str) -> bool:
    """Is it inside a numbered layer? No output head is, whatever its shape."""
    return any(part.isdigit() for part in name.split("."))


def refused_copies(base: Checkpoint, adapter: Adapter) -> Iterator[InputError]:
    """For each copy of a base tensor in the adapter that is not equal to it."""
    for name, values in adapter.copies.items():
        if name not in base.at:
            yield MatchError(f"{printable(adapter.where)}: it holds a copy of {printable(name)}, which the base lacks")
            continue
        info = base.at[name][1].info
        site = Site(name, {"weight": info})
        whole = base.load(site).tensors["weight"] if info.shape == tuple(values.shape) else None
        if whole is None or not bool((whole == values.to(whole.dtype)).all()):
            yield MatchError(
                f"{printable(adapter.where)}: its copy of {printable(name)} is not equal to the base's; "
                "it was trained or resized; name it in modules_to_save"
            )


def replaced(base: Checkpoint, adapter: Adapter) -> tuple[list[tuple[Site, Tensor]], list[InputError]]:
    """The base's tensors that `adapter.saved` takes the place of, and a refusal for each that has none."""
    found: list[tuple[Site, Tensor]] = []
    refusals: list[InputError] = []
    known: Mapping[str, str] = renaming(list(adapter.saved), base.at.keys())
    for name, values in adapter.saved.items():
        there = known.get(name, name)
        if there not in base.at:
            close = ", ".join(printable(other) for other in nearest(name, chain(base.at)))
            refusals.append(
                MatchError(
                    f"{printable(adapter.where)}: {printable(name)} of modules_to_save is not in the base; "
                    f"nearest there: {close}; save the base with that module first"
                )
            )
        elif base.at[there][1].info.shape != tuple(values.shape):
            wanted = list(base.at[there][1].info.shape)
            refusals.append(
                ShapeError(
                    f"{printable(adapter.where)}: {printable(name)} is {list(values.shape)}, the base's is {wanted}; "
                    "they must be equal; resize the base first"
                )
            )
        elif isinstance(base.at[there][1].info.dtype, RawDtype):
            held = base.at[there][1].info.dtype
            refusals.append(
                FormatError(
                    f"{printable(there)}: held as {held}, which modules_to_save cannot replace; "
                    "plain floats are wanted; dequantize the base first"
                )
            )
        else:
            found.append((Site(there, {"weight": base.at[there][1].info}), values))
    return found, refusals
