"""Configs in files: what `from_pretrained` and `save_pretrained` of every config do."""

from pathlib import Path

from surgery.adapters.peft import CONFIG, config_bytes, config_from
from surgery.core.config import AdapterConfig, Where
from surgery.errors import printable
from surgery.io.durable import write_file
from surgery.io.hub import located
from surgery.io.regular import contained
from surgery.io.strict_json import read_json


class PeftFiles:
    """adapter_config.json in a folder."""

    def read(self, where: Where, revision: str | None = None, subfolder: str | None = None) -> AdapterConfig:
        """InputError where none lies, FormatError for one that we cannot follow."""
        place = located(where, revision, subfolder)
        return config_from(read_json(contained(place.path, CONFIG), "an adapter's config"), printable(where))

    def write(self, config: AdapterConfig, folder: Where) -> None:
        write_file(Path(folder) / CONFIG, config_bytes(config))


AdapterConfig.files = PeftFiles()
