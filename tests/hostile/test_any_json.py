"""Any JSON in any field of a config or an index: the merge ends with 0 or 3, never with a traceback."""

import contextlib
import io
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from damages import BASE_CONFIG, CONFIG, INDEX, SHARDS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from merging import merged, sound
from safetensors.torch import save_file
from torch import nn

import surgery
from surgery import LoraConfig

KNOWN = (
    "0",
    "1",
    "0.weight",
    "1.bias",
    "LORA",
    "metadata",
    "weight_map",
    "float32",
    "model_type",
    *SHARDS,
    ".*",
    "(",
    "a+",
)
words = st.sampled_from(KNOWN) | st.text(max_size=8)
numbers = st.integers(-(2**70), 2**70) | st.floats() | st.sampled_from([0, 1, 2, 4, -1, 1e308, 10**400])
values = st.recursive(
    st.none() | st.booleans() | numbers | words,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(words, inner, max_size=4),
    max_leaves=8,
)
FIELDS = (*LoraConfig().to_json(), "never_heard_of", "runtime_config", "")
BASE_FIELDS = (
    "dtype",
    "torch_dtype",
    "text_config",
    "architectures",
    "model_type",
    "quantization_config",
    "tie_word_embeddings",
)
bounded = settings(
    deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sound(tmp_path_factory.mktemp("sound"))


@pytest.fixture(scope="module")
def squares(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of an embedding and a square weight, which config.json says more about."""
    folder = tmp_path_factory.mktemp("squares")
    model = nn.ModuleDict({"embed": nn.Embedding(5, 4), "c_proj": nn.Linear(4, 4)})
    (folder / "base").mkdir()
    save_file(model.state_dict(), folder / "base/model.safetensors")
    config = LoraConfig(r=2, target_modules=["embed", "c_proj"], init_lora_weights=False)
    surgery.save(surgery.inject(model, config), folder / "adapter")
    return folder


@contextlib.contextmanager
def altered(whole: Path, file: str, value: object) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as found:
        folder = Path(found)
        for kind in ("base", "adapter"):
            shutil.copytree(whole / kind, folder / kind)
        (folder / file).write_text(json.dumps(value, ensure_ascii=True))
        yield folder


def ends_well(folder: Path, *options: str) -> None:
    told = io.StringIO()
    with contextlib.redirect_stderr(told), contextlib.redirect_stdout(io.StringIO()):
        code = merged(folder, *options) or 0
    assert code in (0, 3), told.getvalue()
    assert (folder / "out").exists() == (code == 0)
    lines = told.getvalue().splitlines()
    assert sum(not line.startswith("surgery: note: ") for line in lines) == (code == 3)
    assert all(line.isprintable() for line in lines)


@bounded
@given(fields=st.dictionaries(st.sampled_from(FIELDS), values, min_size=1, max_size=2))
def test_any_json_in_an_adapters_config(whole: Path, fields: dict) -> None:
    held = json.loads((whole / CONFIG).read_text())
    with altered(whole, CONFIG, held | fields) as folder:
        ends_well(folder)


@bounded
@given(
    fields=st.dictionaries(st.sampled_from(BASE_FIELDS) | words, values, max_size=3),
    options=st.sampled_from([(), ("--dtype", "bfloat16"), ("--reversible",)]),
)
def test_any_json_in_the_bases_config(squares: Path, fields: dict, options: tuple[str, ...]) -> None:
    with altered(squares, BASE_CONFIG, fields) as folder:
        ends_well(folder, *options)


@bounded
@given(
    fields=st.dictionaries(st.sampled_from(["metadata", "weight_map", "x"]), values, max_size=3),
    entries=st.dictionaries(st.sampled_from(["0.weight", "1.weight", "1.bias", "x"]), values, max_size=2),
    size=values,
    options=st.sampled_from([(), ("--dtype", "bfloat16"), ("--reversible",)]),
)
def test_any_json_in_an_index(whole: Path, fields: dict, entries: dict, size: object, options: tuple[str, ...]) -> None:
    held = json.loads((whole / INDEX).read_text())
    held["metadata"]["total_size"] = size
    held["weight_map"] |= entries
    with altered(whole, INDEX, held | fields) as folder:
        ends_well(folder, *options)


@bounded
@given(file=st.sampled_from([CONFIG, BASE_CONFIG, INDEX]), value=values)
def test_any_json_for_a_whole_file(whole: Path, file: str, value: object) -> None:
    with altered(whole, file, value) as folder:
        ends_well(folder)
