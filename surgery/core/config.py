"""AdapterConfig: the fields of PEFT's adapter_config.json that choose modules, and how a config is read."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from os import PathLike
from typing import Any, ClassVar, Protocol, Self

from torch import Tensor

from surgery.core.field_checks import check_layers, check_names, check_pattern
from surgery.core.method import Method, Params
from surgery.core.patterns import ENDING, PatternTable
from surgery.core.peft_fields import OfFields, as_json
from surgery.core.site import Site
from surgery.core.spec import Spelling
from surgery.core.starter import Held, Starter
from surgery.core.task import TASK_HEADS
from surgery.errors import ConfigError, FormatError, printable, quoted

Where = str | PathLike[str]


class ConfigFiles(Protocol):
    """How configs lie in files, which only higher floors know."""

    def read(self, where: Where, revision: str | None, subfolder: str | None) -> "AdapterConfig": ...

    def write(self, config: "AdapterConfig", folder: Where) -> None: ...


@dataclass(frozen=True, kw_only=True)
class AdapterConfig(ABC, metaclass=OfFields):
    """What the configs of all methods have: which modules are adapted, left out or saved whole, in PEFT's fields.

    A config is a value: `dataclasses.replace` makes another of it. Fields of PEFT's that a method does not serve are
    taken with the value that leaves the maths alone. Raises ConfigError for a value that cannot be, TypeError for a
    field that is not known.

    >>> import surgery, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     surgery.LoraConfig(r=4, target_modules=["q_proj"]).save_pretrained(folder)
    ...     surgery.AdapterConfig.from_pretrained(folder).target_modules
    ['q_proj']
    """

    peft_type: ClassVar[str]
    spellings: ClassVar[Mapping[str, Spelling]]  # how PEFT ends the names of its tensors
    files: ClassVar[ConfigFiles]  # set where files are known
    neutral: ClassVar[Mapping[str, Any]]  # fields we know of, and the only value that leaves the maths alone
    reasons: ClassVar[Mapping[str, str]] = {}  # why another value of those is refused, and the next step
    by_ends: ClassVar[frozenset[str]] = frozenset()  # fields that list ends of names, from whatever character on
    unwritten: ClassVar[frozenset[str]] = frozenset()  # what PEFT's lacks: in the JSON only where it is set
    shared: ClassVar[Mapping[str, str]] = {}  # roles of the tensors that all sites share, by PEFT's names of these
    title: ClassVar[str] = ""  # as users know it, where no method at its sites tells
    deals: ClassVar[bool] = False  # are there tensors that are made for all sites together? See `dealt`
    copied: ClassVar[str] = ""  # what holds its copies of the modules that it targets, where it trains these whole
    repeats_rows: ClassVar[bool] = False  # do its files hold the rows that it replaces for each of tied modules?
    shared_in_parts: ClassVar[bool] = False  # do files hold their rows one by one, numbered?
    draws_places: ClassVar[bool] = False  # are the places of its numbers drawn from a seed, and in no file?
    pattern_form: ClassVar[str] = ENDING  # how PEFT matches a key of its patterns with a name
    repeats_shared: ClassVar[bool] = False  # do PEFT's files hold them at each site, too?

    target_modules: str | Sequence[str] | None = None
    exclude_modules: str | Sequence[str] | None = None
    modules_to_save: Sequence[str] | None = None
    layers_to_transform: int | Sequence[int] | None = None
    layers_pattern: str | Sequence[str] | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    task_type: str | None = None
    inference_mode: bool = False

    def __post_init__(self) -> None:
        for name in ("target_modules", "exclude_modules", "layers_pattern"):
            value = getattr(self, name)
            check_names(name, value, or_pattern=True)
            if isinstance(value, str):
                check_pattern(name, value)
        self._take_patterns()
        check_names("modules_to_save", self.modules_to_save, or_pattern=False)
        check_layers(self.layers_to_transform)
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is bool and not isinstance(value, bool):
                raise ConfigError(f"{field.name} is {quoted(value)}; it must be true or false")
            if field.type == str | None and not isinstance(value, str | None):
                raise ConfigError(f"{field.name} is {quoted(value)}; it must be a string")

    @abstractmethod
    def method(self, name: str) -> Method:
        """The method at the site `name`, with patterns resolved."""

    def endings(self) -> Mapping[str, Spelling]:
        """Of `spellings` those that tensors of this very config have, each role's own last."""
        return self.spellings

    def forms(self) -> Collection[frozenset[str]]:
        """Sets of roles, one of which is all that a site has; the base tells which, where there are several."""
        return [frozenset(one.role for one in self.endings().values() if not one.alone)]

    def told(self, name: str) -> Mapping[str, float]:  # noqa: ARG002  # for those that have such
        """Of its numbers those that patterns resolve for the site `name`, by field."""
        return {}

    def biases(self) -> str:
        """Which biases of the base it trains: "none", "all", or such as "lora_only", those of what it adapts."""
        return "none"

    def parameters(self) -> Sequence[str]:
        """What it adapts that is no module: parameters, by the ends of their names."""
        return ()

    def ties(self) -> bool:
        """Are copies of modules whose weights are tied to be tied too?"""
        return False

    def stacking(self) -> tuple[int, ...]:
        """The model's layers in the order in which they are stacked beneath it; () leaves them as they are."""
        return ()

    def rows(self) -> Collection[str] | None:
        """The modules of which it replaces single rows; None where that is left to the model."""
        return ()

    def with_rows(self, names: Collection[str]) -> Self:  # noqa: ARG002  # for those that have such
        """The same for just the modules `names`."""
        return self

    def with_parameters(self, names: Sequence[str]) -> Self:  # noqa: ARG002  # for those that have such
        """The same for just the parameters `names`."""
        return self

    def unused(self, names: Collection[str]) -> Mapping[str, Sequence[str]]:
        """By field beside the selection, its entries that mean none of the adapted `names`."""
        tables = ((field.name, getattr(self, field.name)) for field in fields(self))
        return {name: table.unused(names) for name, table in tables if isinstance(table, PatternTable)}

    def keeps_shared(self) -> bool:
        """Do its files hold the tensors that sites share?"""
        return True

    def keeping_shared(self) -> Self:
        """The same, whose files do."""
        return self

    def drawn(self, sites: Collection[Site]) -> Mapping[str, Tensor]:  # noqa: ARG002  # for those that share
        """By role, the shared tensors that an adapter over all these sites begins with."""
        return {}

    def dealt(self, sites: Mapping[str, Site]) -> Mapping[str, Params]:  # noqa: ARG002  # for those that have such
        """By site, what it has of tensors that are made for all of these together, in their order."""
        return {}

    def keeps_dealt(self) -> bool:
        """Do its files hold what of these is made from a seed?"""
        return True

    def shared_rows(self, sites: int) -> int | None:  # noqa: ARG002  # as above
        """How many rows so many sites have of what they share; None where any number may do."""
        return None

    def order_of(self, sites: Mapping[str, Params]) -> Sequence[str] | None:  # noqa: ARG002  # as above
        """The order of the sites in which these were made, as their tensors tell; None where they do not."""
        return None

    def spelled_shared(self, shared: Params) -> dict[str, Tensor]:
        """Tensors that sites share, by PEFT's names of them in files."""
        named = {name: shared[role] for name, role in self.shared.items() if role in shared}
        if not self.shared_in_parts:
            return named
        return {f"{name}.{at}": part for name, values in named.items() for at, part in enumerate(values.unbind())}

    def check_given(self, value: object) -> None:  # most have nothing to refuse
        """ConfigError for what the config of peft that it was made of holds beside its fields, such as code."""

    def check_fresh(self) -> None:  # most have nothing to refuse
        """ConfigError for what a fresh adapter cannot be trained with."""

    def check_trained(self) -> None:  # most can be
        """ConfigError for one whose tensors in a file are not to be trained."""

    def check_whole(self) -> None:  # most have nothing to refuse
        """ConfigError where tensors in a file are not all of the adapter."""

    def starter(self, site: Site, held: Held) -> Starter | None:  # noqa: ARG002  # most start without
        """What makes the tensors that an adapter starts with at a site, where the base alone does not."""
        return None

    def settled(self, observers: Mapping[str, Any]) -> bool:  # noqa: ARG002  # for those that ask
        """Have these, by site, seen enough?"""
        return True

    def after(self, observers: Mapping[str, Any]) -> tuple[Self, Collection[str]]:
        """The config that what these have seen makes of it, and the sites that remain."""
        return self, observers.keys()

    def as_shaped(self, shapes: Mapping[str, Mapping[str, tuple[int, ...]]]) -> Self:  # noqa: ARG002  # as above
        """The same as a file's tensors tell, by site and role, where PEFT writes what it does not heed."""
        return self

    def written(self, sites: Mapping[str, Params]) -> tuple[Self, Mapping[str, Params]]:
        """Config and tensors as files hold them, where training has let go of some."""
        return self, sites

    def named(self, names: Sequence[str]) -> Self:
        """The same for just the modules `names`, spelled so that a reader needs no matching."""
        return replace(self, target_modules=names, exclude_modules=None, layers_to_transform=None, layers_pattern=None)

    def task_heads(self) -> frozenset[str]:
        """Entries that PEFT adds to `modules_to_save` for this task; they may match nothing."""
        return TASK_HEADS.get(self.task_type or "", frozenset())

    def to_json(self) -> dict[str, Any]:
        """Every field that PEFT 0.21.2 writes, sorted by name."""
        own = {field.name: as_json(getattr(self, field.name)) for field in fields(self)}
        own = {name: value for name, value in own.items() if value is not None or name not in self.unwritten}
        known = {name: as_json(value) for name, value in self.neutral.items()}
        origin = {"auto_mapping": None, "peft_type": self.peft_type, "peft_version": "0.21.2"}
        return dict(sorted((known | origin | own).items()))

    @classmethod
    def from_pretrained(cls, where: Where, *, revision: str | None = None, subfolder: str | None = None) -> Self:
        """The config in a folder, or of owner/name on the Hub; FormatError if it is of another kind than this class."""
        found = cls.files.read(where, revision, subfolder)
        if not isinstance(found, cls):
            raise FormatError(f"{printable(where)}: peft_type is {found.peft_type}; a {cls.__name__} is wanted")
        return found

    def save_pretrained(self, folder: Where) -> None:
        """Write `adapter_config.json` into a folder, which is made if there is none."""
        self.files.write(self, folder)

    def _take_patterns(self) -> None:
        """Tables of patterns become such as bound what matching may cost."""
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name.endswith("_pattern") and isinstance(value, Mapping):
                if not all(isinstance(key, str) for key in value):
                    raise ConfigError(f"{field.name} has a key that is not a name or pattern; it must be a string")
                table = PatternTable(value, self.pattern_form)
                table.check(field.name)
                object.__setattr__(self, field.name, table)

    @classmethod
    def from_json(cls, data: Mapping[str, Any], where: str = "adapter_config.json") -> Self:
        """The config that `data` spells. FormatError for a field that changes the maths in a way we lack."""
        cls.check_known(data, where)
        try:
            return cls(**{name: value for name, value in data.items() if name in cls.own()})
        except ConfigError as error:
            raise FormatError(f"{where}: {error}") from error
        except (TypeError, AttributeError) as error:
            raise FormatError(f"{where}: {error}; a field has the wrong type") from error
