"""surgery push OUT REPO."""

import click

from surgery.cli.arguments import as_json, show

private = click.option("--private", is_flag=True, help="Make the repository private, where it is made.")


@click.command()
@click.argument("out")
@click.argument("repo", metavar="REPO")
@private
@as_json
def push(out: str, repo: str, private: bool, as_json: bool) -> None:
    """Upload a merge to the Hub, with a model card.

    OUT becomes one commit of REPO; the card is made from its receipt.
    Afterwards the hashes that the Hub states are compared with those of OUT, which stays as it is.
    """
    from surgery.api import files

    show(files.push_to_hub(out, repo, private=private), as_json)
