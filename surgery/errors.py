"""Every error that surgery raises on purpose, and the exit code of each.

SurgeryError
├── UsageError           2  a call that cannot mean anything
│   └── ConfigError      2  a config value that cannot be
│       └── ConfigTypeError  2  what is given as a config is none
├── InputError           3  a file, tensor or name that is refused
│   ├── AbsentError      3  what is named is not there
│   ├── FormatError      3  a file is not what its name says
│   ├── MatchError       3  a name fits nothing, or more than one thing
│   ├── ShapeError       3  tensors that do not fit together
│   ├── ValueRangeError  3  numbers that cannot be merged: NaN, infinity, overflow
│   └── StateError       3  the model or folder is not in the state that the call needs
├── CheckError           4  a check ran and failed
├── EnvironmentFault     5  disk, permission, network, memory, a missing package
└── OutputExistsError    6  the output is there already, busy, or an input

A message reads `<where>: <found>; <wanted>; <next step>`. Options stand in it in backticks, by their names in Python,
as `into` or `into=keep`; the command line tells them as --into and --into keep. A UsageError and a StateError are
ValueErrors too, as transformers raises them; an AbsentError is an OSError and a ValueError, for it raises either.
"""


class SurgeryError(Exception):
    """Every error that surgery raises on purpose is one of these; `exit_code` is what the command line returns for it.

    >>> import surgery, torch
    >>> try:
    ...     surgery.inject(torch.nn.Sequential(torch.nn.Linear(2, 2)), surgery.LoraConfig(target_modules=["q_proj"]))
    ... except surgery.SurgeryError as error:
    ...     print(type(error).__name__, error.exit_code)
    MatchError 3
    """

    exit_code = 1


class UsageError(SurgeryError, ValueError):
    """A call that cannot mean anything: options that exclude each other, or a value that is none of those wanted."""

    exit_code = 2


class ConfigError(UsageError):
    """A value of a config that cannot be, such as a rank of 0; or one that this call cannot follow."""


class ConfigTypeError(ConfigError, TypeError):
    """What is given as a config is neither a config, nor a dict of one's fields, nor the folder of an adapter."""


class InputError(SurgeryError):
    """A file, tensor or name that is refused."""

    exit_code = 3


class AbsentError(InputError, OSError, ValueError):
    """What is named is not there: a path, or a repository of the Hub."""


class FormatError(InputError):
    """A file is not what its name says: damaged, contradicting another, or in a format that is not read."""


class MatchError(InputError):
    """A name fits nothing, or more than one thing; the message has the nearest names."""


class ShapeError(InputError):
    """Tensors that do not fit together, such as an adapter's and those of another base."""


class ValueRangeError(InputError):
    """Numbers that cannot be merged: NaN, infinity, overflow."""


class StateError(InputError, ValueError):
    """The model or folder is not in the state that the call needs, such as a model that is merged already."""


class CheckError(SurgeryError):
    """A check ran and failed: a tensor is different, or too little of an adapter is left."""

    exit_code = 4


class EnvironmentFault(SurgeryError):  # noqa: N818  # EnvironmentError is a builtin
    """Disk, permission, network, memory, or a missing package."""

    exit_code = 5


class OutputExistsError(SurgeryError):
    """The output is there already, another run writes it, or it overlaps with an input."""

    exit_code = 6


def printable(name: object) -> str:
    """`name` on one line, cut to 200 characters: backslashes and what cannot be seen are escaped, letters stay."""
    text = visible(str(name)[:201].replace("\\", r"\\"))
    return text if len(text) <= 200 else text[:197] + "..."


def quoted(text: object) -> str:
    r"""`text` in quotes, on one line and cut to 200 characters; backslashes stay, so that a pattern reads as written.

    >>> print(quoted(r"layers\.\d+"))
    'layers\.\d+'
    """
    shown = visible(str(text)[:201])
    shown = shown if len(shown) <= 200 else shown[:197] + "..."
    return f'"{shown}"' if "'" in shown and '"' not in shown else f"'{shown}'"


def visible(text: str) -> str:
    r"""`text` with each character that shows nothing or turns others round as an escape; XML can hold the rest.

    >>> print(visible("größe\x1b\u202e"))
    größe\x1b\u202e
    """
    if text.isascii() and text.isprintable():  # as nearly all are
        return text
    return "".join(one if _is_seen(one) else one.encode("unicode_escape").decode("ascii") for one in text)


def _is_seen(char: str) -> bool:
    return char.isprintable() and not any(first <= char <= last for first, last in _BLANK)


# Printable to Python, and yet blank: fillers, joiners, choices of a glyph's form.
_BLANK = (
    ("\u034f", "\u034f"),
    ("\u115f", "\u1160"),
    ("\u17b4", "\u17b5"),
    ("\u180b", "\u180f"),
    ("\u2800", "\u2800"),
    ("\u3164", "\u3164"),
    ("\ufe00", "\ufe0f"),
    ("\uffa0", "\uffa0"),
    ("\U0001d159", "\U0001d159"),
    ("\U000e0100", "\U000e01ef"),
)
