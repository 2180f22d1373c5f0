"""The card of a merge: what it states follows from the receipt and the base's card, and nothing else is in it."""

from typing import Any

import pytest
import yaml

from surgery.procedures.writing.model_card import front_matter, model_card

COMMIT, OTHER = "a" * 40, "b" * 40
DIGEST = "c" * 64
CHANGED = {"w.weight": {"methods": [{"method": "LORA"}], "sha256": DIGEST}}


def receipt(base: dict[str, Any], *adapters: dict[str, Any], carried: tuple[str, ...] = ("config.json",)) -> dict:
    told = [{"sha256": {"adapter_model.safetensors": "d" * 64, "x.lora_A": "e" * 64}, **one} for one in adapters]
    return {
        "base": {"files": {"model.safetensors": DIGEST}, **base},
        "adapters": told,
        "changed": CHANGED,
        "untouched": {"a": DIGEST, "b": DIGEST},
        "carried": list(carried),
        "files": {"model.safetensors": "f" * 64},
        "reversible": False,
    }


ON_HUB = {"hub_id": "owner/base", "commit": COMMIT}
ADAPTER = {"hub_id": "owner/adapter", "commit": OTHER, "weight": (1.0).hex()}
LOCAL = {"weight": (0.1).hex()}


def card(found: dict, stated: dict[str, Any] | None = None) -> tuple[dict[str, Any], str]:
    text = model_card(found, DIGEST, stated or {}, "me/merged")
    assert text.startswith("---\n")
    _, head, body = text.split("---\n", 2)
    return yaml.safe_load(head), body


def test_one_adapter_makes_a_finetune_of_its_base() -> None:
    head, body = card(receipt(ON_HUB, ADAPTER))
    assert head == {
        "base_model": ["owner/base"],
        "base_model_relation": "finetune",
        "library_name": "transformers",
        "tags": ["model-surgery", "lora"],
    }
    assert f"`@{COMMIT}`" in body
    assert f"`@{OTHER}`" in body
    assert f"sha256 `{DIGEST}`" in body
    assert f"surgery verify owner/base@{COMMIT} owner/adapter@{OTHER} me/merged " in body
    assert "surgery verify me/merged " in body


def test_several_adapters_make_a_merge_with_their_weights() -> None:
    head, body = card(receipt(ON_HUB, ADAPTER, ADAPTER | {"hub_id": "owner/second", "weight": (-0.1).hex()}, LOCAL))
    assert head["base_model"] == ["owner/base", "owner/adapter", "owner/second"]
    assert head["base_model_relation"] == "merge"
    assert "merge" in head["tags"]
    assert f"owner/second@{OTHER}=-0.1 ADAPTER=0.1 me/merged" in body
    assert body.count("| adapter |") == 3


def test_a_local_base_is_known_by_its_hashes_alone() -> None:
    head, body = card(receipt({}, LOCAL))
    assert "base_model" not in head
    assert "base_model_relation" not in head
    assert DIGEST in body
    assert "d" * 64 in body
    assert "e" * 64 not in body
    _, body = card(receipt({"fingerprint": "1" * 64}, LOCAL))
    assert "| base | fingerprint `" + "1" * 64 + "` | |" in body


@pytest.mark.parametrize(
    ("stated", "kept"),
    [
        ({}, {}),
        ({"license": "apache-2.0"}, {"license": "apache-2.0"}),
        (
            {"license": "other", "license_name": "llama3", "license_link": "https://x.y/LICENSE"},
            {"license": "other", "license_name": "llama3", "license_link": "https://x.y/LICENSE"},
        ),
        ({"license_link": "LICENSE"}, {"license_link": "LICENSE"}),
        ({"license_link": "USE.md"}, {"license_link": f"https://huggingface.co/owner/base/blob/{COMMIT}/USE.md"}),
        ({"license_link": "/home/me/LICENSE"}, {}),
        ({"license_link": "file:///home/me/LICENSE"}, {}),
        ({"license_link": "../LICENSE"}, {}),
        ({"license": "/home/me/license"}, {}),
        ({"license": ["mit", "apache-2.0"]}, {"license": ["mit", "apache-2.0"]}),
        ({"license": {"a": 1}}, {}),
        ({"license": None}, {}),
        (yaml.safe_load("license: &a [*a]"), {}),
        ({"language": ["en", "de"], "pipeline_tag": "text-generation"}, None),
    ],
)
def test_the_license_is_the_bases_or_absent(stated: dict[str, Any], kept: dict[str, Any] | None) -> None:
    head, _ = card(receipt(ON_HUB, ADAPTER, carried=("config.json", "LICENSE")), stated)
    found = {key: value for key, value in head.items() if key not in ("base_model", "base_model_relation", "tags")}
    assert found == {"library_name": "transformers"} | (stated if kept is None else kept)


@pytest.mark.parametrize(
    ("text", "stated"),
    [
        ("---\nlicense: mit\n---\ntext", {"license": "mit"}),
        ("---\r\nlicense: mit\r\n---\r\ntext", {"license": "mit"}),
        ("---\nlicense: mit\n---", {"license": "mit"}),
        ("text", {}),
        ("", {}),
        ("---\n[1, 2]\n---\n", {}),
        ("---\na: [\n---\n", {}),
        ("---\nlicense: !!python/object/apply:os.getcwd []\n---\n", {}),
        ("---\n" + "[" * 2000 + "\n---\n", {}),
        ("---\na: " + "x" * (1 << 16) + "\n---\n", {}),
        ("---\nlicense: mit\n", {}),
        ("---\n1: 2\n---\n", {"1": 2}),
    ],
)
def test_front_matter_is_read_or_empty(text: str, stated: dict[str, Any]) -> None:
    assert front_matter(text) == stated


def test_no_path_of_the_machine_is_in_a_card() -> None:
    stated = {"license": "mit", "base_model": "/home/me/base", "model_path": "/home/me", "library_name": "/home/me"}
    found = receipt(
        {"path": "/home/me/base"}, LOCAL | {"path": "/home/me/adapter", "sha256": {"/home/me/x.safetensors": DIGEST}}
    )
    assert "/home" not in model_card(found, DIGEST, stated, "me/merged")
