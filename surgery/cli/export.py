"""surgery export BASE [ADAPTER[=WEIGHT]...] OUT."""

from typing import Any

import click

from surgery.cli.arguments import adapters_of, as_json, dtype, into, ops, overwrite, show, tied
from surgery.cli.progress import shown


@click.command()
@click.argument("base")
@click.argument("adapters", metavar="[ADAPTER[=WEIGHT]...]", nargs=-1)
@click.argument("out")
@click.option("--format", "kind", type=click.Choice(["onnx"]), default="onnx", show_default=True)
@click.option(
    "--adapters",
    "how",
    type=click.Choice(["merged", "swappable"]),
    default="merged",
    show_default=True,
    help="Merged into the weights, or each as an .onnx_adapter file that onnxruntime puts into slots of the graph.",
)
@click.option(
    "--weights",
    type=click.Choice(["link", "copy"]),
    default="link",
    show_default=True,
    help="The graph points into the safetensors, or has model.onnx.data of its own, to be shipped alone.",
)
@click.option("--names", type=click.Choice(["hf", "genai"]), default="hf", show_default=True, help="Of the slots.")
@click.option("--kv", is_flag=True, help="A decoder with its cache: past_key_values.N.key in, present.N.key out.")
@dtype
@tied
@ops
@into
@click.option(
    "--portable", is_flag=True, help="Weights in 4 bits by operators of ONNX alone, not by MatMulBnb4 of onnxruntime."
)
@click.option("--max-memory", metavar="SIZE", help="What the comparison may take, such as 16GB. Default: what is free.")
@overwrite
@as_json
def export(  # noqa: PLR0913, PLR0917  # what the function spells otherwise; all else goes on as it is
    base: str, adapters: tuple[str, ...], out: str, kind: str, how: str, as_json: bool, **options: Any
) -> None:
    """Merge adapters into BASE as an ONNX model in the new folder OUT.

    OUT holds the merged safetensors, and model.onnx, whose initializers are their bytes. It appears once onnxruntime
    has been seen to compute what the model does; exit code 4 if it does not.
    """
    from surgery.api.export import export_onnx

    del kind
    with shown("exporting") as progress:
        swappable = how == "swappable"
        report = export_onnx(base, adapters_of(adapters), out, swappable=swappable, progress=progress, **options)
    show(report, as_json)
