"""The model card of a merge, from its receipt and the front matter of the base's card; it names no path."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_HEAD = re.compile(r"\A\s*---\r?\n(.*?)\r?\n---\s*?(?:\n|\Z)", re.DOTALL)
HEAD_CHARACTERS = 1 << 16
_LICENSE = ("license", "license_name", "license_link")
_PLAIN = re.compile(r"[\w][\w .,+()-]{0,99}")
_LINK = re.compile(r"https?://[^\s<>\"]{1,500}|\w[\w.-]{0,99}", re.ASCII)


def model_card(receipt: Mapping[str, Any], receipt_sha256: str, base_card: Mapping[str, Any], hub_id: str) -> str:
    """README.md for `hub_id`; `base_card` is the front matter of the base's own card, of which the license is kept."""
    import yaml

    head = yaml.safe_dump(_front_matter(receipt, base_card), sort_keys=False, allow_unicode=True)
    return f"---\n{head}---\n\n" + "\n".join(_body(receipt, receipt_sha256, hub_id))


def front_matter(card: str) -> dict[str, Any]:
    """What the card of a model states before its text; empty if it states nothing that can be read."""
    import yaml

    found = _HEAD.match(card[:HEAD_CHARACTERS])
    try:
        stated = yaml.safe_load(found[1]) if found else None
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return {str(key): value for key, value in stated.items()} if isinstance(stated, dict) else {}


def _front_matter(receipt: Mapping[str, Any], base_card: Mapping[str, Any]) -> dict[str, Any]:
    base, adapters = receipt["base"], receipt["adapters"]
    found: dict[str, Any] = {}
    if base.get("hub_id"):
        several = len(adapters) > 1
        others = [one["hub_id"] for one in adapters if one.get("hub_id")] if several else []
        found["base_model"] = [base["hub_id"], *others]
        found["base_model_relation"] = "merge" if several else "finetune"  # as the Hub calls one adapter merged
    if library := _plain(base_card.get("library_name")) or (
        "transformers" if "config.json" in receipt["carried"] else None
    ):
        found["library_name"] = library
    for key in ("pipeline_tag", "language", *_LICENSE[:2]):
        if (value := _plain(base_card.get(key))) is not None:
            found[key] = value
    if (link := _license_link(base_card.get("license_link"), receipt)) is not None:
        found["license_link"] = link
    found["tags"] = ["model-surgery", *_methods(receipt), *(["merge"] if len(adapters) > 1 else [])]
    return found


def _plain(value: object) -> str | list[str] | None:
    """A word or words as they stand; None for anything else, such as a path."""
    words: list[Any] = value if isinstance(value, list) else [value]
    if not words or not all(isinstance(one, str) and _PLAIN.fullmatch(one) for one in words):
        return None
    return words if isinstance(value, list) else str(value)


def _license_link(link: object, receipt: Mapping[str, Any]) -> str | None:
    """An address, or a file that is carried; a file of the base alone by its address on the Hub."""
    if not isinstance(link, str) or not _LINK.fullmatch(link):
        return None
    if "://" in link or link in receipt["carried"]:
        return link
    return None if not receipt["base"].get("hub_id") else f"{_address(receipt['base'])}/{link}"


def _address(one: Mapping[str, Any]) -> str:
    return f"https://huggingface.co/{one['hub_id']}/blob/{one.get('commit') or 'main'}"


def _methods(receipt: Mapping[str, Any]) -> list[str]:
    found = {str(m["method"]).lower() for one in receipt["changed"].values() for m in one.get("methods", ())}
    return sorted(found)


def _body(receipt: Mapping[str, Any], receipt_sha256: str, hub_id: str) -> Iterator[str]:
    base, adapters = receipt["base"], receipt["adapters"]
    changed, untouched = len(receipt["changed"]), len(receipt["untouched"])
    yield f"# {hub_id.rpartition('/')[2]}\n"
    what = "An adapter" if len(adapters) == 1 else f"{len(adapters)} adapters"
    yield f"{what} merged into a base with `surgery`. Tensors changed: {changed}; the base's own bytes: {untouched}.\n"
    yield "| part | what | weight |\n| --- | --- | --- |"
    yield f"| base | {_named(base)} | |"
    for one in adapters:
        yield f"| adapter | {_named(one)} | {_weight(one)} |"
    yield "\n## Verify\n"
    yield f"`surgery.receipt.json` has the sha256 `{receipt_sha256}`, and states that of every file and tensor.\n"
    yield f"```\npip install model-surgery\nsurgery verify {hub_id}    # the files against the receipt"
    yield f"surgery verify {' '.join(_spelled(base, adapters))} {hub_id}    # merged anew, compared bit for bit\n```\n"
    if receipt.get("reversible"):
        yield f"`surgery unmerge {hub_id} BASE` gives the base's files back, to the bit.\n"
    yield _about_base(base)


def _named(one: Mapping[str, Any]) -> str:
    """Repository and commit; where there is none, sha256 of the files, and no name of them."""
    if one.get("hub_id"):
        return f"[{one['hub_id']}](https://huggingface.co/{one['hub_id']})" + _at(one, "`@{}`")
    if one.get("fingerprint"):
        return f"fingerprint `{one['fingerprint']}`"
    hashes = one.get("files") or {key: value for key, value in one["sha256"].items() if key.endswith(".safetensors")}
    return "<br>".join(f"sha256 `{digest}`" for _, digest in sorted(hashes.items()))


def _at(one: Mapping[str, Any], form: str) -> str:
    return form.format(one["commit"]) if one.get("commit") else ""


def _weight(one: Mapping[str, Any]) -> str:
    return repr(float.fromhex(one["weight"]))


def _spelled(base: Mapping[str, Any], adapters: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The inputs as the command line takes them."""
    yield base["hub_id"] + _at(base, "@{}") if base.get("hub_id") else "BASE"
    for one in adapters:
        weight = float.fromhex(one["weight"])
        name = one["hub_id"] + _at(one, "@{}") if one.get("hub_id") else "ADAPTER"
        yield name if weight == 1 else f"{name}={weight!r}"


def _about_base(base: Mapping[str, Any]) -> str:
    if not base.get("hub_id"):
        return "What the base's own card says, of its use and its limits, is not repeated here.\n"
    return (
        f"What the base's own card says, of its use and its limits, is not repeated here: [read it]({_address(base)}"
        "/README.md).\n"
    )
