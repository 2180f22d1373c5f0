"""quiet: transformers without what it logs and draws while it loads and writes; afterwards it does so as before."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from surgery.integrations.transformers.loading import transformers_package


@contextmanager
def quiet() -> Iterator[Any]:
    """Gives the package. EnvironmentFault if it is missing."""
    transformers = transformers_package()
    logging = transformers.utils.logging
    level, drawn = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield transformers
    finally:
        logging.set_verbosity(level)
        if drawn:
            logging.enable_progress_bar()
