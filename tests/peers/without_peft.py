"""A plugin of pytest: in its process peft is not installed, as far as anything can tell."""

import sys
from importlib.machinery import ModuleSpec, PathFinder


class WithoutPeft(PathFinder):
    """Finds every module but peft."""

    @classmethod
    def find_spec(cls, name: str, *rest: object, **named: object) -> ModuleSpec | None:
        return None if name.partition(".")[0] == "peft" else PathFinder.find_spec(name, *rest, **named)


assert "peft" not in sys.modules
sys.meta_path[sys.meta_path.index(PathFinder)] = WithoutPeft
