"""Each example of transformers' page on adapters, with surgery in peft's place; peft need not be installed."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from fake_hub import FakeHub, running
from guarded import is_guarded
from huggingface_hub import constants
from huggingface_hub.utils import _http
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    FalconConfig,
    FalconModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5Model,
    Trainer,
    TrainingArguments,
    WhisperConfig,
    WhisperModel,
)

import surgery
from surgery.integrations.transformers.default_targets import DEFAULTS
from surgery.layers import Adapted
from surgery.methods import METHODS

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99}
TOKENS = torch.arange(24).reshape(2, 12)
ROWS = [{"input_ids": row, "labels": row} for row in torch.arange(48).reshape(8, 6)]
CONFIGS: dict[str, dict[str, Any]] = {  # a method is one line here
    "LORA": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "IA3": {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "ADALORA": {"init_r": 4, "target_r": 2, "total_step": 3, "target_modules": ["q_proj", "down_proj"]},
    "LOHA": {"r": 4, "target_modules": ["q_proj", "v_proj"]},
    "LOKR": {"r": 2, "target_modules": ["q_proj", "v_proj"]},
    "MISS": {"r": 8, "target_modules": ["q_proj", "down_proj"]},
    "SHIRA": {"r": 4, "target_modules": ["q_proj", "down_proj"]},
    "GLORA": {"r": 4, "target_modules": ["q_proj", "down_proj"]},
    "SUPERTUNING": {"r": 4, "target_modules": ["q_proj", "down_proj"]},
    "C3A": {"block_size": 16, "target_modules": ["q_proj", "down_proj"]},
    "WAVEFT": {"n_frequency": 200, "target_modules": ["q_proj", "down_proj"]},
    "FOURIERFT": {"n_frequency": 200, "target_modules": ["q_proj", "down_proj"]},
}
PAIRS = [("LORA", "IA3"), ("IA3", "LORA"), ("LORA", "LORA"), ("IA3", "IA3"), ("LORA", "ADALORA"), ("ADALORA", "IA3")]
PAIRS += [("LOHA", "LORA"), ("LORA", "LOKR"), ("LOKR", "LOHA"), ("LORA", "MISS"), ("LORA", "SHIRA"), ("LORA", "C3A")]
PAIRS += [("LORA", "FOURIERFT"), ("LORA", "WAVEFT")]
PAIRS += [
    ("LOHA", "LORA"),
    ("LORA", "LOKR"),
    ("LOKR", "LOHA"),
    ("LORA", "MISS"),
    ("LORA", "SHIRA"),
    ("LORA", "C3A"),
    ("LORA", "GLORA"),
    ("SUPERTUNING", "LORA"),
]


def config(kind: str) -> dict[str, Any]:
    """As adapter_config.json holds it; a fresh adapter of it changes the outcome already."""
    return {"peft_type": kind, "task_type": "CAUSAL_LM", **CONFIGS[kind], _INIT[kind]: False}


_INIT = {"LORA": "init_lora_weights", "IA3": "init_ia3_weights", "ADALORA": "init_lora_weights"}
_INIT |= dict.fromkeys(("LOHA", "LOKR", "MISS", "SHIRA", "C3A", "FOURIERFT", "WAVEFT"), "init_weights")
_INIT |= dict.fromkeys(("LOHA", "LOKR", "MISS", "SHIRA", "GLORA", "SUPERTUNING", "C3A"), "init_weights")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SMALL)).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def under(kind: str, base: Path, name: str = "default") -> Any:
    """The base, read by transformers, under a fresh adapter."""
    told = {**config(kind), "base_model_name_or_path": str(base)}
    return surgery.inject(AutoModelForCausalLM.from_pretrained(base), told, adapter_name=name)


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS).logits


@pytest.mark.skipif(not is_guarded(), reason="peft is here")
def test_peft_is_not_there_and_transformers_alone_refuses_the_page(base: Path) -> None:
    with pytest.raises(ModuleNotFoundError):
        import peft  # noqa: F401
    with pytest.raises(ValueError, match="PEFT is not installed"):
        AutoModelForCausalLM.from_pretrained(base).add_adapter(config("LORA"))


def test_the_first_example_names_no_modules_and_its_task_by_its_class(base: Path) -> None:
    from surgery import LoraConfig, TaskType

    model = AutoModelForCausalLM.from_pretrained(base)
    told = {"inference_mode": False, "r": 8, "lora_alpha": 32, "lora_dropout": 0.1}
    surgery.inject(model, LoraConfig(task_type=TaskType.CAUSAL_LM, **told), adapter_name="lora_1")
    adapted = {
        name.rpartition(".lora_A")[0].rpartition(".")[2] for name, _ in model.named_parameters() if "lora_A" in name
    }
    assert adapted == {"q_proj", "v_proj"}
    model.add_adapter(LoraConfig(**told), adapter_name="lora_2")
    assert {one.peft_type for one in model.peft_config.values()} == {"LORA"}


CLASSES = {"LORA": surgery.LoraConfig, "IA3": surgery.IA3Config, "ADALORA": surgery.AdaLoraConfig}
CLASSES |= {"LOHA": surgery.LoHaConfig, "LOKR": surgery.LoKrConfig}
MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=9)),
    "falcon": lambda: FalconModel(FalconConfig(**SMALL)),
    "bert": lambda: BertModel(BertConfig(**SMALL)),
    "t5": lambda: T5Model(T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=9)),
}


_OF_METHODS = re.compile(r"\.(?:lora|ia3|hada|lokr)_")
_REFUSED = {("gpt2", "LOHA"), ("gpt2", "LOKR")}  # a Conv1D
CASES = [
    (model, kind) for model in MODELS for kind in CLASSES if model in DEFAULTS[kind] and (model, kind) not in _REFUSED
]


@pytest.mark.parametrize(("model", "kind"), CASES)
def test_a_config_without_modules_adapts_those_that_it_adapts_in_peft(model: str, kind: str) -> None:
    peft = pytest.importorskip("peft")
    options = {"total_step": 9} if kind == "ADALORA" else {_INIT[kind]: False}
    ours, theirs = surgery.inject(MODELS[model](), CLASSES[kind](**options)), MODELS[model]()
    peft.inject_adapter_in_model(peft.get_peft_config({"peft_type": kind, **options}), theirs)
    found, wanted = (
        {name: values.shape for name, values in one.named_parameters() if _OF_METHODS.search(name)}
        for one in (ours, theirs)
    )
    assert found == wanted
    assert found
    tokens = {"input_ids": TOKENS % 9} | ({"decoder_input_ids": TOKENS % 9} if model == "t5" else {})
    ours.load_state_dict(theirs.state_dict(), strict=kind != "ADALORA")  # peft's has a number more
    with torch.no_grad():
        given, wanted = (one.eval()(**tokens)[0] for one in (ours, theirs))
    # Those of which peft makes a delta sum in another order here, over the 64 terms or fewer of a few layers.
    room = 2 * 64 * torch.finfo(torch.float32).eps * float(wanted.abs().max()) if _INIT[kind] == "init_weights" else 0
    assert float((given - wanted).abs().max()) <= room


def test_every_default_of_peft_is_known() -> None:
    constants = pytest.importorskip("peft.utils.constants")
    called = {kind: f"TRANSFORMERS_MODELS_TO_{kind.replace('_', '')}_TARGET_MODULES_MAPPING" for kind in METHODS}
    tables = {kind: getattr(constants, name) for kind, name in called.items() if hasattr(constants, name)}
    assert tables.keys() == DEFAULTS.keys()
    for kind, table in tables.items():
        assert {name: sorted(one) for name, one in table.items()} == {
            name: sorted(one.targets) for name, one in DEFAULTS[kind].items()
        }
    feedforward = constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING
    assert {name: list(one.feedforward) for name, one in DEFAULTS["IA3"].items()} == feedforward


@pytest.mark.parametrize("kind", ["VERA", "PVERA", "RANDLORA", "OFT", "BOFT", "HRA"])
def test_methods_of_other_shapes_adapt_by_default_what_lora_does(kind: str) -> None:
    sizes = {"OFT": {"oft_block_size": 4}, "BOFT": {}}.get(kind, {"r": 4})
    model = surgery.inject(MODELS["llama"](), METHODS[kind](**sizes))
    adapted = {name.rpartition(".")[2] for name, one in model.named_modules() if isinstance(one, Adapted)}
    assert adapted == {"q_proj", "v_proj"}


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize(
    "fields", [("exclude_modules", ["{}"]), ("exclude_modules", "re:.*{}"), ("modules_to_save", ["{}"])], ids=str
)
def test_of_the_default_modules_those_are_left_out_that_the_config_takes_away(
    kind: str, fields: tuple[str, Any]
) -> None:
    options, (*kept, gone) = {"total_step": 9} if kind == "ADALORA" else {}, DEFAULTS[kind]["llama"].targets
    field, entry = fields
    taken = entry.format(gone) if isinstance(entry, str) else [one.format(gone) for one in entry]
    model = surgery.inject(MODELS["llama"](), CLASSES[kind](**options, **{field: taken}))
    names = [_OF_METHODS.split(name) for name, _ in model.named_parameters()]
    adapted = {before.rpartition(".")[2] for before, *after in names if after}
    assert adapted == {*kept}
    with pytest.raises(surgery.MatchError, match=r"target_modules: nothing matches .*takes away all it hits"):
        surgery.inject(MODELS["llama"](), CLASSES[kind](**options, exclude_modules=[*kept, gone]))
    with pytest.raises(surgery.MatchError, match=f"nothing matches '{gone}' .exclude_modules"):
        surgery.inject(
            MODELS["llama"](), CLASSES[kind](**options, target_modules=[*kept, gone], exclude_modules=[gone])
        )
    with pytest.raises(surgery.MatchError, match="exclude_modules: nothing matches 'absent'"):
        surgery.inject(MODELS["llama"](), CLASSES[kind](**options, exclude_modules=["absent"]))


def test_a_model_without_a_known_default_is_refused() -> None:
    config = WhisperConfig(
        d_model=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2
    )
    with pytest.raises(surgery.MatchError, match="target_modules is not given"):
        surgery.inject(WhisperModel(config), surgery.LoraConfig())
    with pytest.raises(surgery.MatchError, match="target_modules is not given"):
        surgery.inject(nn.Sequential(nn.Linear(2, 2)), surgery.LoraConfig())


@pytest.mark.parametrize("kind", CONFIGS)
def test_an_adapter_model_is_loaded_by_one_call(kind: str, base: Path, tmp_path: Path) -> None:
    model = under(kind, base)
    model.save_pretrained(tmp_path / "adapter")
    found = surgery.load_model(tmp_path / "adapter", model_class=AutoModelForCausalLM)
    assert torch.equal(outputs(found), outputs(model))
    assert not torch.equal(outputs(found), outputs(AutoModelForCausalLM.from_pretrained(base)))


@pytest.mark.parametrize("kind", CONFIGS)
def test_an_adapter_is_loaded_onto_a_model_that_is_there(kind: str, base: Path, tmp_path: Path) -> None:
    model = under(kind, base)
    model.save_pretrained(tmp_path / "adapter")
    found = surgery.load(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")
    assert torch.equal(outputs(found), outputs(model))
    found.load_adapter(str(tmp_path / "adapter"), adapter_name="again")
    assert found.active_adapters() == ["again"]
    assert torch.equal(outputs(found), outputs(model))


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_a_second_adapter_is_added_and_they_are_switched_disabled_and_enabled(
    first: str, second: str, base: Path
) -> None:
    alone = outputs(AutoModelForCausalLM.from_pretrained(base))
    model = under(first, base, "adapter_1")
    one = outputs(model)
    model.add_adapter(config(second), adapter_name="adapter_2")
    two = outputs(model)
    assert model.active_adapters() == ["adapter_2"]
    model.set_adapter("adapter_1")
    assert torch.equal(outputs(model), one)
    model.disable_adapters()
    assert torch.equal(outputs(model), alone)
    model.enable_adapters()
    assert torch.equal(outputs(model), one)
    model.set_adapter("adapter_2")
    assert torch.equal(outputs(model), two)
    assert not torch.equal(one, two)
    assert not torch.equal(two, alone)
    model.delete_adapter("adapter_1")
    assert torch.equal(outputs(model), two)


def test_adapters_of_other_ranks_are_swapped_in_place(base: Path, tmp_path: Path) -> None:
    wanted = []
    for name, r in (("one", 4), ("two", 8)):
        torch.manual_seed(r)
        made = surgery.inject(AutoModelForCausalLM.from_pretrained(base), {**config("LORA"), "r": r})
        made.save_pretrained(tmp_path / name)
        wanted.append(outputs(made))
    model = AutoModelForCausalLM.from_pretrained(base)
    model.enable_peft_hotswap(target_rank=8)  # transformers' own, before the first adapter
    surgery.load(model, tmp_path / "one", adapter_name="default")
    parameters = [id(values) for values in model.parameters()]
    # A rank of 4 among 8 rows: at most as many roundings as there are terms, in two layers.
    torch.testing.assert_close(outputs(model), wanted[0], rtol=0, atol=2 * 64 * torch.finfo(torch.float32).eps)
    model.load_adapter(tmp_path / "two", adapter_name="default")
    torch.testing.assert_close(outputs(model), wanted[1], rtol=0, atol=2 * 64 * torch.finfo(torch.float32).eps)
    assert [id(values) for values in model.parameters()] == parameters


@pytest.mark.parametrize("kind", CONFIGS)
def test_text_is_generated_with_the_adapter_and_without(kind: str, base: Path) -> None:
    # Frozen, as under an adapter: torch takes another kernel, with other last bits, where a weight has gradients.
    model = AutoModelForCausalLM.from_pretrained(base).eval().requires_grad_(False)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "output_scores": True}
    alone = model.generate(TOKENS, return_dict_in_generate=True, **options).scores
    surgery.inject(model, config(kind)).disable_adapters()
    off = model.generate(TOKENS, return_dict_in_generate=True, **options).scores
    model.enable_adapters()
    on = model.generate(TOKENS, return_dict_in_generate=True, **options).scores
    assert torch.equal(torch.stack(off), torch.stack(alone))
    assert not torch.equal(on[0], off[0])


@pytest.mark.parametrize("kind", CONFIGS)
def test_an_adapter_is_trained_by_trainer_saved_and_loaded_again(kind: str, base: Path, tmp_path: Path) -> None:
    model = under(kind, base)
    before, start = outputs(model), {name: values.clone() for name, values in model.state_dict().items()}
    quiet = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no"}
    arguments = TrainingArguments(str(tmp_path / "run"), max_steps=3, learning_rate=0.1, **quiet)
    Trainer(model=model, args=arguments, train_dataset=ROWS).train()
    assert not torch.equal(outputs(model), before)
    changed = {name for name, values in model.state_dict().items() if not torch.equal(values, start[name])}
    assert changed == {name for name, values in model.named_parameters() if values.requires_grad}
    model.save_pretrained(tmp_path / "adapter")
    files = {"adapter_config.json", "adapter_model.safetensors", "surgery.base.json"}
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == files
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["peft_type"] == kind
    again = surgery.load(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")
    assert torch.equal(outputs(again), outputs(model))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    monkeypatch.setenv("NO_PROXY", "*")
    with running() as found:
        template = found.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", found.endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)
        _http.close_session()
        yield found
        _http.close_session()


@pytest.mark.parametrize("kind", CONFIGS)
def test_an_adapter_is_pushed_to_the_hub_and_loaded_by_its_id(kind: str, hub: FakeHub, base: Path) -> None:
    model = under(kind, base)
    model.push_to_hub("me/adapter")
    repository = hub.repositories["me/adapter"]
    there = repository.commits[repository.branches["main"]].keys()
    assert there - {"README.md"} == {"adapter_config.json", "adapter_model.safetensors", "surgery.base.json"}
    assert torch.equal(outputs(surgery.load_model("me/adapter")), outputs(model))
    with pytest.raises(OSError, match="no such repository") as raised:
        model.load_adapter("me/none", "second")
    assert isinstance(raised.value, surgery.AbsentError)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("bits", ["load_in_8bit", "load_in_4bit"])
def test_an_adapter_is_loaded_onto_a_base_in_8_or_4_bit_and_added_to_it(
    bits: str, kind: str, base: Path, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    under(kind, base).save_pretrained(tmp_path / "adapter")
    settings = transformers.BitsAndBytesConfig(**{bits: True})
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=settings)
    surgery.load(model, tmp_path / "adapter")
    loaded = outputs(model)
    model.add_adapter(config(kind), "added")
    model.train()(input_ids=TOKENS, labels=TOKENS).loss.backward()
    assert all(values.grad is not None for name, values in model.named_parameters() if "added" in name)
    model.set_adapter("default")
    assert torch.equal(outputs(model), loaded)
    model.disable_adapters()
    assert not torch.equal(outputs(model), loaded)


@pytest.mark.parametrize("error", [OSError, ValueError, surgery.AbsentError])
@pytest.mark.parametrize("missing", ["/no/such", "no-such", "./x", "empty"])
def test_an_adapter_that_is_not_there_raises_what_transformers_raises(
    missing: str, error: type[Exception], base: Path, tmp_path: Path
) -> None:
    model = under("LORA", base)
    (tmp_path / "empty").mkdir()
    place = str(tmp_path / "empty") if missing == "empty" else missing
    with pytest.raises(error, match="wanted"):
        model.load_adapter(place, "second")
    assert model.active_adapters() == ["default"]
