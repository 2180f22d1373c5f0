"""Which ops a method acts on."""

from surgery.core.site import Site
from surgery.errors import MatchError, printable


def only_linear(site: Site, method: str) -> None:
    """MatchError for a site that is no Linear."""
    _only(site, method, ("linear",), "Linear")


def only_linear_or_conv1d(site: Site, method: str) -> None:
    """MatchError for a site that is neither Linear nor transformers' Conv1D."""
    _only(site, method, ("linear", "conv1d"), "Linear and Conv1D of transformers")


def only_matrices(site: Site, method: str) -> None:
    """MatchError for a site that is neither of these nor an Embedding."""
    _only(site, method, ("linear", "conv1d", "embedding"), "Linear, Conv1D of transformers and Embedding")


def _only(site: Site, method: str, ops: tuple[str, ...], told: str) -> None:
    if site.acting.name not in ops or site.acting.alone:
        raise MatchError(
            f"{printable(site.name)}: its op is {site.acting.name}; {method} acts on {told}, as in PEFT; exclude it"
        )
