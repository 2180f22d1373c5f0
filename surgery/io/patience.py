"""Patience: a call to the Hub made again where that can help, within bounds, and told in plain words where not.

huggingface_hub does not repeat a GET that is answered by 500 or 503, waits without a bound where a Retry-After
asks for it, and tells both as files that are not in the cache. So while a call of ours runs in a thread, a hook
on its client turns such answers into `Later`, which leaves the library at once.
"""

import json
import logging
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

from surgery.errors import AbsentError, EnvironmentFault, InputError, SurgeryError, printable

TRIES = 4
WAIT_S = 60.0  # in all, over every file of a repository
FIRST_WAIT_S = 0.5  # doubled after each try

T = TypeVar("T")
_ours: ContextVar[bool] = ContextVar("_ours", default=False)
_NO_JSON = (json.JSONDecodeError, UnicodeDecodeError)
_RATE_LIMIT = re.compile(r";\s*r\s*=\s*0\s*;\s*t\s*=\s*(\d+)")  # "api";r=0;t=55


class Later(Exception):  # noqa: N818  # no error yet
    """An answer that may be another one later; `wait_s` is what the Hub asks for, if it does."""

    def __init__(self, status: int, wait_s: float | None) -> None:
        super().__init__(f"status {status}")
        self.wait_s = wait_s


class Patience:
    """Runs calls about `name`, from several threads at once; all their waits together are bounded."""

    def __init__(self, name: str, tries: int = TRIES, wait_s: float = WAIT_S) -> None:
        self.name, self.tries, self.left_s = name, tries, wait_s
        self.lock = threading.Lock()

    def run(self, call: Callable[[], T], file: str = "") -> T:
        """What `call` gives. InputError for what the Hub refuses, EnvironmentFault after the last try."""
        where = f"{self.name}: {printable(file)}" if file else self.name
        for tried in range(1, self.tries + 1):
            try:
                with _listening():
                    return call()
            except (Later, OSError, ValueError, RuntimeError, _http_error()) as raised:
                error = _meant(raised)
                refusal = _refusal(error, where)
                if refusal is not None:
                    raise refusal from error
                self._wait(error, where, tried)
        raise AssertionError("the last try returns or raises")

    def _wait(self, error: Exception, where: str, tried: int) -> None:
        asked_s = error.wait_s if isinstance(error, Later) else None
        wait_s = FIRST_WAIT_S * 2 ** (tried - 1) if asked_s is None else asked_s
        tries = f"{tried} {'try' if tried == 1 else 'tries'}"
        if tried == self.tries:
            raise _given_up(error, where, tries) from error
        with self.lock:
            if wait_s > self.left_s:
                raise _given_up(error, where, f"{tries}, and it asks to wait {wait_s:.0f} s more") from error
            self.left_s -= wait_s
        time.sleep(wait_s)


def _meant(error: Exception) -> Exception:
    """What went wrong in a thread of the library's own, where the hook is silent; uploads wrap it."""
    if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    response: Any = getattr(error, "response", None)
    if response is not None and _passes(response.status_code):
        return Later(response.status_code, _asked_s(response.headers))
    return error


# What no further try mends, by the library's error; the first that fits.
_FINAL = (
    ("GatedRepoError", InputError, "gated; accept its terms on the Hub and log in with `hf auth login`"),
    ("RepositoryNotFoundError", AbsentError, "the Hub has no such repository, or it is private; check name and login"),
    ("RevisionNotFoundError", AbsentError, "the repository has no such revision; check branch, tag or commit"),
    ("RemoteEntryNotFoundError", AbsentError, "listed, but the Hub does not have it (404); was its upload cut off?"),
    ("HfHubHTTPError", InputError, "the Hub refuses it ({}); check the name and your login"),
    ("HFValidationError", InputError, "not a name that the Hub can hold; owner/name is wanted; check the name"),
    ("OfflineModeIsEnabled", EnvironmentFault, "HF_HUB_OFFLINE forbids to ask the Hub; unset it"),
    ("FileMetadataError", EnvironmentFault, "the answer lacks its ETag or commit; check HF_ENDPOINT and any proxy"),
    ("TooManyRedirects", EnvironmentFault, "the Hub redirects in a circle; check HF_ENDPOINT and any proxy"),
)


def _refusal(error: BaseException, where: str) -> SurgeryError | None:
    """The error that no further try mends; None if there may be another outcome."""
    names = {kind.__name__ for kind in type(error).__mro__}
    if "LocalEntryNotFoundError" in names:  # what the library makes of almost any answer
        cause = error.__cause__
        return _unreachable(error, where) if cause is None else _refusal(cause, where) or _unreachable(cause, where)
    for name, kind, told in _FINAL:
        if name in names:
            return kind(f"{where}: {told.format(_kind(error))}")
    if isinstance(error, ValueError) and not isinstance(error, _NO_JSON):
        return InputError(f"{where}: huggingface_hub refuses it ({printable(error)})")
    if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError | TimeoutError):
        found = printable(error.strerror or _kind(error))
        return EnvironmentFault(f"{where}: it cannot be stored ({found}); see to the disk and run again")
    return None


def _unreachable(error: BaseException, where: str) -> EnvironmentFault:
    """The library has tried for half a minute already; how often depends on its version."""
    found = f"several tries, the last: {_kind(error)}"
    return EnvironmentFault(f"{where}: the Hub cannot be reached ({found}); check the network and run again")


def _given_up(error: Exception, where: str, tries: str) -> SurgeryError:
    if "Consistency check failed" in str(error):  # the library's words for a body of another length
        return InputError(f"{where}: not of the length that the Hub states, in {tries}; do not use it")
    return EnvironmentFault(f"{where}: the Hub gives no answer ({tries}, the last: {_kind(error)}); try again later")


def _kind(error: BaseException) -> str:
    match error:
        case Later():
            return str(error)
        case _ if hasattr(error, "response"):
            return f"status {error.response.status_code}"
        case json.JSONDecodeError() | UnicodeDecodeError():
            return "an answer that is no JSON"
    return type(error).__name__


def _http_error() -> type[Exception]:
    """The root of the errors of the HTTP client, which is another package for each major version of the library."""
    from huggingface_hub.errors import HfHubHTTPError

    return next(kind for kind in HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError")


@contextmanager
def _listening() -> Iterator[None]:
    """While it runs, this thread's calls of the library end at `Later`, and its warnings are ours to tell."""
    from huggingface_hub import get_session

    client: Any = get_session()
    if _hook not in client.event_hooks["response"]:
        client.event_hooks = {**client.event_hooks, "response": [*client.event_hooks["response"], _hook]}
    for handler in logging.getLogger("huggingface_hub").handlers:
        handler.addFilter(_quiet)
    token = _ours.set(True)
    try:
        yield
    finally:
        _ours.reset(token)


def _quiet(record: logging.LogRecord) -> bool:
    return not _ours.get() or record.levelno >= logging.ERROR


def _hook(response: Any) -> None:
    if not _ours.get():
        return
    status: int = response.status_code
    if _passes(status):
        raise Later(status, _asked_s(response.headers))
    tag = response.headers.get("X-Linked-ETag") or response.headers.get("ETag") or ""
    if response.request.method == "HEAD" and re.search(r"[/\\\x00]|\.\.", tag.removeprefix("W/")):
        raise InputError(f"{printable(response.request.url)}: its ETag is {printable(tag)}; a hash is wanted")


def _passes(status: int) -> bool:
    return status in (408, 429) or status >= 500


def _asked_s(headers: Mapping[str, str]) -> float | None:
    """Seconds that an answer asks to wait, by Retry-After or by the Hub's own header of rate limits."""
    asked = headers.get("Retry-After", "").strip()
    limit = _RATE_LIMIT.search(headers.get("RateLimit", ""))
    if asked.isascii() and asked.isdecimal():
        return float(asked)
    if asked:
        with suppress(ValueError, TypeError):  # a date, taken against the Hub's own clock
            until, now = parsedate_to_datetime(asked), parsedate_to_datetime(headers.get("Date", ""))
            return max(0.0, (until - now).total_seconds())
    return None if limit is None else float(limit[1])
