"""The commands and their flags."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="scion",
    help="A strong small base language model out of a large one, with few tokens.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Every command takes --debug for a traceback. Exit codes: 0 done, 2 wrong request, 3 diverged, 65 broken "
    "data or model, 74 disk or network, 75 stopped and saved.",
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Model = Annotated[str, typer.Argument(help="Folder, hub id ORG/NAME[@REVISION], .gguf file, or smollm2-135m.")]


def _version(value: bool) -> None:
    if value:
        from scionlm import __version__

        print(f"scion {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    """A strong small base language model out of a large one, with few tokens."""


@app.command()
def demo(
    out: Annotated[Path, typer.Option("-o", "--out", help="Run folder.")] = Path("runs/demo"),
) -> None:
    """See the whole story on a real model and real text, on a CPU, in minutes."""
    from scionlm import api
    from scionlm.cli.tables import print_run

    print_run(api.demo(out), out)


@app.command()
def inspect(model: Model, json: Json = False) -> None:
    """Show a model's family, shape and parameters."""
    from scionlm.cli.inspect import inspect_model
    from scionlm.cli.tables import print_inspection, print_json

    facts = inspect_model(model)
    print_json(facts) if json else print_inspection(facts)


@app.command()
def prepare(
    corpora: Annotated[Path, typer.Argument(help="CORPORA.yaml: which files make up which domain.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Data folder.")],
    workers: Annotated[int | None, typer.Option(help="Threads; the result does not depend on it.", min=1)] = None,
) -> None:
    """Read, tokenize, split and shard text; the same command goes on after a stop."""
    from scionlm import api
    from scionlm.cli.tables import print_data

    print_data(api.prepare(corpora, out, workers), out)


@app.command()
def inherit(
    source: Model,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the result.")],
    layers: Annotated[int | None, typer.Option(help="How many layers to keep.")] = None,
    keep: Annotated[str | None, typer.Option(help="Which layers to keep, as 0-7,12.")] = None,
    strategy: Annotated[str | None, typer.Option(help="How to choose them: first, first_last or spaced.")] = None,
) -> None:
    """Make a smaller model out of layers of a larger one; the result proves itself before it is written."""
    from scionlm.cli.inherit import inherit_command

    inherit_command(source, out, layers, keep, strategy)


@app.command()
def run(
    recipe: Annotated[str, typer.Argument(help="A preset, a recipe's name, or a YAML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings.")] = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Run folder (default: runs/RECIPE, or where config.yaml is).")
    ] = None,
    allow_change: Annotated[bool, typer.Option("--allow-change", help="Go on with changed settings.")] = False,
) -> None:
    """Run a recipe; the same command goes on after a stop."""
    from scionlm.cli.tables import print_run
    from scionlm.recipes.presets import load_recipe
    from scionlm.recipes.run import run_recipe
    from scionlm.report import write_report

    path = Path(recipe)
    folder = out or (path.parent if path.name == "config.yaml" else Path("runs") / path.stem)
    result = run_recipe(load_recipe(recipe, overrides or []), folder, allow_change)
    write_report(folder)
    print_run(result, folder)


@app.command()
def evaluate(
    model: Model,
    data: Annotated[Path, typer.Option(help="Data folder made by scion prepare.")],
    max_tokens: Annotated[int | None, typer.Option(help="Budget a domain.", min=1)] = None,
    seq_len: Annotated[int, typer.Option(help="Tokens predicted in one window.", min=2)] = 1024,
    per_document: Annotated[bool, typer.Option("--per-document", help="The rolling form of lm-eval.")] = False,
    precision: Annotated[str, typer.Option(help="fp32, bf16 or auto.")] = "fp32",
    domain: Annotated[list[str] | None, typer.Option(help="Only this domain (may be given again).")] = None,
    json: Json = False,
) -> None:
    """Measure loss, perplexity and bits per byte on the held-out part of each domain."""
    from scionlm import api
    from scionlm.cli.tables import print_json, print_losses

    losses = api.evaluate(
        model,
        data,
        seq_len=seq_len,
        max_tokens=max_tokens,
        per_document=per_document,
        precision=precision,
        domains=domain,
    )
    found = {name: loss.to_dict() for name, loss in losses.items()}
    settings = {"model": model, "seq_len": seq_len, "per_document": per_document, "precision": precision}
    print_json(settings | {"domains": found, "tasks": {}}) if json else print_losses(found, settings)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    out: Annotated[Path | None, typer.Option("-o", "--out", help="The page (default: RUN/report.html).")] = None,
) -> None:
    """Write one self-contained page about a run."""
    from scionlm.report import write_report

    print(write_report(run, out))


@app.command()
def presets(name: Annotated[str | None, typer.Argument(help="Print this one as YAML.")] = None) -> None:
    """List the presets, or print one."""
    from scionlm.cli.tables import print_presets
    from scionlm.recipes.presets import preset_text

    if name is None:
        print_presets()
    else:
        print(preset_text(name), end="")
