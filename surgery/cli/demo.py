"""surgery demo: runs examples/demo.py, which a wheel carries inside the package."""

import runpy
from pathlib import Path

import click

import surgery

_PACKAGE = Path(surgery.__file__).parent


@click.command()
@click.option("--out", type=click.Path(path_type=Path), help="Keep the files in this new folder.")
def demo(out: Path | None) -> None:
    """Do the main job on a real model.

    Trains, merges, verifies, exports and unmerges an adapter, in about a minute.
    """
    from surgery.io.hub import local_path

    folders = (_PACKAGE / "examples", _PACKAGE.parent / "examples")
    script = next(folder / "demo.py" for folder in folders if (folder / "demo.py").is_file())
    runpy.run_path(str(script))["run"](None if out is None else local_path(out))
