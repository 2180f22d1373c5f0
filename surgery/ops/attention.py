"""Attention: the one linear map that gives query, key and value, of a layer that reads its weights itself."""

from dataclasses import dataclass

from surgery.core.site import Site
from surgery.ops.linear import Linear


@dataclass(frozen=True)
class Attention(Linear):
    """torch.nn.MultiheadAttention with one `in_proj_weight`. Its `out_proj` is a site of its own, and a Linear."""

    name = "attention"
    roles = {"weight": "in_proj_weight", "bias": "in_proj_bias"}  # noqa: RUF012  # as Op's


def attention_site(site: Site) -> Site:
    """A site of a checkpoint with its tensors in their roles: those of an attention layer are not named so."""
    if "weight" in site.tensors or Attention.roles["weight"] not in site.tensors:
        return site
    own = {role: site.tensors[name] for role, name in Attention.roles.items() if name in site.tensors}
    return Site(site.name, own, site.op, site.aliases, site.tied)
