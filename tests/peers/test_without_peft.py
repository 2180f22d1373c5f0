"""Where peft is not installed, all holds that these files hold; in one process, for to begin takes as long as they."""

from pathlib import Path

from guarded import passed_without_peft

LEAST = {
    "test_load_model.py": 15,
    "test_trainer.py": 15,
    "test_transformers_methods.py": 30,
    "test_transformers_page.py": 20,
}  # tests that pass


def test_all_of_these_files_holds_where_peft_is_not_installed() -> None:
    here = Path(__file__).parent
    passed = passed_without_peft(str(here / name) for name in LEAST)
    assert {name: passed[name] > least for name, least in LEAST.items()} == dict.fromkeys(LEAST, True)
