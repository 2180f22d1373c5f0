"""Snapshot: the files that are needed of one commit of a Hub repository, in the Hub's cache, each checked.

The commit and what the Hub states of every file come in one answer; then each file is fetched from that commit.
What is fetched is checked against its sha256, or its blob id where git holds it; what lies in the cache already
was so checked when it came, and is checked by its size, and by its hash again if it is small.
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from surgery.errors import EnvironmentFault, FormatError, InputError, printable
from surgery.io.hub_cache import CachedRepository
from surgery.io.hub_files import HubFile, hub_file, is_commit, needed_at_first, needed_weights, shard_names
from surgery.io.patience import TRIES, Patience
from surgery.io.strict_json import read_json
from surgery.io.weight_files import INDEX

WORKERS = 4  # small files at once
TIMEOUT_S = 10.0


def snapshot(hub_id: str, revision: str | None, subfolder: str = "") -> tuple[Path, str]:
    """The folder and its commit. InputError for what the Hub refuses or what is not what it states.

    With `subfolder`, only what is needed of that folder of the repository is fetched.

    A whole copy in the cache is used without a network, and after one failed try; EnvironmentFault if there is none.
    """
    from huggingface_hub import constants

    name = hub_id if revision is None else f"{hub_id}@{revision}"
    cache = CachedRepository(hub_id, subfolder)
    commit = cache.commit_of(revision or "main")
    state = cache.state(commit) if commit is not None else None
    whole = commit if state is not None and state.whole else None
    if whole is not None and (constants.HF_HUB_OFFLINE or (whole == revision and state is not None and state.listed)):
        return cache.folder(whole), whole
    if constants.HF_HUB_OFFLINE:
        found = "not in the Hub's cache" if state is None else printable(state.found)
        raise EnvironmentFault(f"{name}: {found}, and HF_HUB_OFFLINE forbids to ask the Hub; unset it once")
    patience = Patience(name, TRIES)
    try:
        asked = Patience(name, 1) if whole else patience
        commit, files = asked.run(lambda: listing(hub_id, revision, name))
    except EnvironmentFault:
        if whole is None:
            raise
        return cache.folder(whole), whole
    return Fetch(hub_id, commit, cache, patience).all(files, revision or "main"), commit


class Fetch:
    """Brings the files of one commit into the cache."""

    def __init__(self, hub_id: str, commit: str, cache: CachedRepository, patience: Patience) -> None:
        self.hub_id, self.commit, self.cache, self.patience = hub_id, commit, cache, patience
        self.folder = cache.folder(commit)
        self.inner = f"{cache.subfolder}/" if cache.subfolder else ""

    def all(self, files: list[HubFile], revision: str) -> Path:
        """All that is needed; the folder. Weights come one after another in this thread, which Ctrl-C ends at once."""
        inside = [one._replace(name=one.name[len(self.inner) :]) for one in files if one.name.startswith(self.inner)]
        first = self._whole_names(needed_at_first(inside, self.patience.name))
        if not self.cache.state(self.commit).listed:
            self.cache.keep(self.commit, None)
        with ThreadPoolExecutor(WORKERS) as pool:
            list(pool.map(self._one, first))
        shards = self._shards() if any(file.name == self.inner + INDEX for file in first) else []
        weights = self._whole_names(needed_weights(inside, shards, self.patience.name))
        unchecked = [file.name for file in weights if not self.cache.holds(self.commit, file)]
        self.cache.keep(self.commit, [*first, *weights], unchecked)
        for file in weights:
            self._one(file)
        self.cache.keep(self.commit, [*first, *weights])
        self.cache.keep_ref(revision, self.commit)
        return self.folder

    def _whole_names(self, files: list[HubFile]) -> list[HubFile]:
        return [one._replace(name=self.inner + one.name) for one in files]

    def _shards(self) -> list[str]:
        try:
            return list(shard_names(read_json(self.folder / self.inner / INDEX).get("weight_map")))
        except FormatError:
            return []  # the reader of the checkpoint says what is wrong with it

    def _one(self, file: HubFile) -> None:
        from huggingface_hub import hf_hub_download

        if self.cache.holds(self.commit, file):
            return
        self.cache.discard(self.commit, file.name)  # what is there is not whole
        path = self.patience.run(lambda: hf_hub_download(self.hub_id, file.name, revision=self.commit), file.name)
        where = f"{self.patience.name}: {printable(file.name)}"
        if Path(path) != self.folder / file.name:
            raise InputError(f"{where}: the Hub gives it from another commit than {self.commit}; run again")
        if not file.is_content_of(self.folder / file.name):
            self.cache.discard(self.commit, file.name)
            raise InputError(f"{where}: its bytes are not those that the Hub states; they are removed; run again")


def listing(hub_id: str, revision: str | None, name: str) -> tuple[str, list[HubFile]]:
    """The commit that `revision` is now, and its files, in one answer of the Hub."""
    from huggingface_hub import HfApi

    try:
        info = HfApi().model_info(hub_id, revision=revision, files_metadata=True, timeout=TIMEOUT_S)
    except (KeyError, TypeError, AttributeError, RecursionError) as error:  # JSON of another shape
        raise _no_hub(name) from error
    if not is_commit(info.sha) or info.siblings is None or (is_commit(revision) and info.sha != revision):
        raise _no_hub(name)
    assert info.sha is not None
    return info.sha, [
        hub_file(one.rfilename, one.size, one.lfs.sha256 if one.lfs else None, one.blob_id, name)
        for one in info.siblings
    ]


def _no_hub(name: str) -> EnvironmentFault:
    return EnvironmentFault(f"{name}: the answer is no listing of a repository; check HF_ENDPOINT and any proxy")
