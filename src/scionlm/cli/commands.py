"""The commands and their flags."""

import contextlib
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

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
Pickle = Annotated[bool, typer.Option("--allow-pickle", help="Convert foreign .bin weights, once.")]
Model = Annotated[str, typer.Argument(help="Folder, hub id ORG/NAME[@REVISION], .gguf file, or smollm2-135m.")]


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Leave garbage alone: looking for it among what is imported takes a fifth of a plan's second."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


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
def inspect(model: Model, allow_pickle: Pickle = False, json: Json = False) -> None:
    """Show a model's family, shape and parameters."""
    from scionlm.cli.inspect import inspect_model
    from scionlm.cli.tables import print_inspection, print_json

    facts = inspect_model(model, allow_pickle)
    print_json(facts) if json else print_inspection(facts)


@app.command()
def prepare(
    corpora: Annotated[Path, typer.Argument(help="CORPORA.yaml: which files make up which domain.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Data folder.")],
    workers: Annotated[int | None, typer.Option(help="Threads; the result does not depend on it.", min=1)] = None,
) -> None:
    """Read, tokenize, split and shard text; the same command goes on after a stop, and shares the work with others."""
    import os

    from scionlm import api
    from scionlm.cli.tables import print_data

    index = api.prepare(corpora, out, workers)
    if os.environ.get("RANK", "0") == "0":  # under torchrun every rank gets here
        print_data(index, out)


@app.command("train-tokenizer")
def train_tokenizer(
    corpora: Annotated[Path, typer.Argument(help="CORPORA.yaml; it needs no tokenizer.")],
    vocab_size: Annotated[int, typer.Option(help="Tokens, with the 256 bytes and the special tokens.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the tokenizer.")],
    special: Annotated[list[str] | None, typer.Option(help="A special token beside <|endoftext|>; repeatable.")] = None,
    max_bytes: Annotated[str, typer.Option(help="Text taken from each domain at most.")] = "100MB",
) -> None:
    """Train a byte-level BPE tokenizer on your own domains."""
    from scionlm import api
    from scionlm.cli.inherit import parse_bytes

    size = api.train_tokenizer(corpora, out, vocab_size, tuple(special or ()), parse_bytes(max_bytes, "max-bytes"))
    print(f"{out}: {size:,} tokens; use it with tokenizer: {out} in CORPORA.yaml")


@app.command("fit-reference")
def fit_reference(
    table: Annotated[Path, typer.Argument(help="TABLE.yaml, .json or .csv: losses in nats by domain and size.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The references, a .json file.")],
    parameters: Annotated[
        list[str] | None, typer.Option(help="A size that is wanted, 1.3B or NAME=1345423360; repeatable.")
    ] = None,
    bounds: Annotated[
        str, typer.Option(help="positive keeps the loss of an endless model at 0 or above; none is the paper's fit.")
    ] = "positive",
    json: Json = False,
) -> None:
    """Fit a scaling curve to the losses of several sizes and read off reference losses for another."""
    from scionlm.cli.fit_reference import fit_reference_command

    fit_reference_command(table, out, parameters, bounds, json)


@app.command()
def inherit(
    source: Annotated[
        str, typer.Argument(help="Folder, hub id, .gguf file or smollm2-135m, or a YAML file with mergekit's slices.")
    ],
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Folder for the result.")] = None,
    layers: Annotated[int | None, typer.Option(help="How many layers the result has.")] = None,
    keep: Annotated[str | None, typer.Option(help="Which layers to keep, as 0-7,12 or 0-29:2.")] = None,
    strategy: Annotated[
        str | None,
        typer.Option(
            help="How to choose them: first, last, middle, every[:K], first_last[:K], spaced, random[:SEED], stack, "
            "hybrid_stack, block_influence."
        ),
    ] = None,
    scores: Annotated[
        str | None,
        typer.Option(help="Keep the layers of highest layer_scores in a JSON file; an analysis has those of removal."),
    ] = None,
    repeat: Annotated[bool, typer.Option("--repeat", help="Let --keep name a layer twice.")] = False,
    grow: Annotated[
        str | None, typer.Option(help="Add layers up to --layers: source_next, stack, zero_output or random.")
    ] = None,
    donor: Annotated[str | None, typer.Option(help="The model that --grow source_next takes layers from.")] = None,
    hidden_size: Annotated[int | None, typer.Option(help="Channels of the residual stream.")] = None,
    intermediate_size: Annotated[int | None, typer.Option(help="Channels of the MLP.")] = None,
    num_attention_heads: Annotated[int | None, typer.Option(help="Query heads.")] = None,
    num_key_value_heads: Annotated[int | None, typer.Option(help="Key/value heads.")] = None,
    importance: Annotated[
        str | None, typer.Option(help="Which heads and channels stay: first, random, magnitude, activation or taylor.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Data folder for what is measured: block_influence, activation, taylor.")
    ] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Folder of a tokenizer to trim the vocabulary to.")] = None,
    vocab_size: Annotated[int | None, typer.Option(help="Trim the source's own tokenizer to this size.")] = None,
    pad_vocab_to: Annotated[int | None, typer.Option(help="Pad the vocabulary to a multiple of this.")] = None,
    fresh: Annotated[str | None, typer.Option(help="Parts not to inherit, as mlp,mlp_norm.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of fresh weights and of what is drawn by lot.", min=0)] = 0,
    shard_size: Annotated[str, typer.Option(help="Largest weight file.")] = "5GB",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be done.")] = False,
    no_verify: Annotated[
        bool, typer.Option("--no-verify", help="Only compare rows of each written tensor with the source's.")
    ] = False,
    verify_layers: Annotated[
        bool, typer.Option("--verify-layers", help="Prove one layer of each kind alone, for models larger than memory.")
    ] = False,
    allow_pickle: Pickle = False,
    json: Json = False,
) -> None:
    """Make a smaller model out of a larger one; the result proves itself before it is moved into place."""
    from scionlm.cli.inherit import inherit_command

    options: Any = {
        "layers": layers, "keep": keep, "strategy": strategy, "scores": scores, "repeat": repeat, "grow": grow,
        "donor": donor, "hidden_size": hidden_size, "intermediate_size": intermediate_size,
        "num_attention_heads": num_attention_heads, "num_key_value_heads": num_key_value_heads,
        "importance": importance, "data": data, "tokenizer": tokenizer, "vocab_size": vocab_size,
        "pad_vocab_to": pad_vocab_to, "fresh": fresh, "seed": seed, "allow_pickle": allow_pickle,
    }  # fmt: skip
    verify = "layers" if verify_layers else not no_verify
    inherit_command(source, out, options, dry_run, verify, shard_size, json)


@app.command()
def analyze(
    model: Model,
    data: Annotated[Path, typer.Option(help="Data folder made by scion prepare.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the analysis.")],
    seq_len: Annotated[int | None, typer.Option(help="Tokens of a sequence (default 100).")] = None,
    num_sequences: Annotated[int | None, typer.Option(help="Sequences to look at (default 100).")] = None,
    loss_sequences: Annotated[int | None, typer.Option(help="Of them, how many for losses (default 20).")] = None,
    layers: Annotated[int | None, typer.Option(help="Layers that suggestions keep (default: half).")] = None,
    greedy: Annotated[int | None, typer.Option(help="Take out this many, the cheapest first; takes long.")] = None,
    against: Annotated[str | None, typer.Option(help="Another MODEL, or its analysis, to set beside.")] = None,
    tau: Annotated[float | None, typer.Option(help="Share of the energy that defines the rank (default 0.9).")] = None,
    eta: Annotated[float | None, typer.Option(help="Share of the mass that is the minimal mass (default 0.9).")] = None,
    length: Annotated[list[int] | None, typer.Option(help="A shorter length to count for too; repeatable.")] = None,
    lazy_tolerance: Annotated[
        float | None, typer.Option(help="Lazy: a MaxRank below 1 and this (default 0.5).")
    ] = None,
    domain: Annotated[list[str] | None, typer.Option(help="Only this domain; repeatable.")] = None,
    split: Annotated[str | None, typer.Option(help="train (default) or held_out.")] = None,
    exact: Annotated[bool, typer.Option("--exact", help="Singular values in float64, slower.")] = False,
    precision: Annotated[str | None, typer.Option(help="fp32 (default), bf16 or auto.")] = None,
    stream: Annotated[
        bool | None,
        typer.Option("--stream/--no-stream", help="Read weights layer by layer (default: by the model's size)."),
    ] = None,
    plots: Annotated[bool, typer.Option("--plots", help="Write figures as SVG and PNG.")] = False,
    seed: Annotated[int | None, typer.Option(help="Seed of the sample (default 0).")] = None,
    allow_pickle: Pickle = False,
    json: Json = False,
) -> None:
    """Look at attention and layers: rank collapse, what each layer is worth, which to keep."""
    from scionlm import api
    from scionlm.cli.analyze import print_analysis
    from scionlm.cli.tables import print_json

    found = api.analyze(
        model, data=data, out=out, against=against, plots=plots, allow_pickle=allow_pickle,
        seq_len=seq_len, num_sequences=num_sequences, loss_sequences=loss_sequences, layers=layers, greedy=greedy,
        tau=tau, eta=eta, lengths=length, lazy_tolerance=lazy_tolerance, domains=domain, split=split, exact=exact,
        precision=precision, stream=stream, seed=seed,
    )  # fmt: skip
    print_json(found.record) if json else print_analysis(found.record, out)


@app.command()
def plan(
    recipe: Annotated[str, typer.Argument(help="A preset, a recipe's name, or a YAML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings.")] = None,
    device: Annotated[
        str | None, typer.Option(help="What to plan for, as h100 (docs/reference/names.md); default: this machine.")
    ] = None,
    devices: Annotated[int, typer.Option(min=1, help="How many devices.")] = 1,
    per_node: Annotated[int | None, typer.Option(min=1, help="In one machine (default: all, up to 8 GPUs).")] = None,
    calibrate: Annotated[bool, typer.Option("--calibrate", help="Measure a few steps here.")] = False,
    find_lr: Annotated[
        bool, typer.Option("--find-lr", help="Suggest a peak learning rate from a few dozen steps here.")
    ] = False,
    price: Annotated[float | None, typer.Option(min=0, help="Price of a device for an hour; adds the cost.")] = None,
    json: Json = False,
) -> None:
    """Say what a run will take before anything is spent: parameters, FLOPs, memory, time, learning rate."""
    from scionlm import api
    from scionlm.cli.plan import print_plan, print_sweep_plan
    from scionlm.cli.tables import print_json

    how = {"device": device, "devices": devices, "per_node": per_node, "price": price}
    with contextlib.nullcontext() if calibrate or find_lr else _no_collection():
        found = api.plan(recipe, overrides or [], calibrate=calibrate, find_lr=find_lr, **how)
    if json:
        print_json(found)
    else:
        print_sweep_plan(found) if found["recipe"] == "sweep" else print_plan(found)


@app.command()
def run(
    recipe: Annotated[str, typer.Argument(help="A preset, a recipe's name, or a YAML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings.")] = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Run folder (default: runs/RECIPE, or where config.yaml is).")
    ] = None,
    allow_change: Annotated[bool, typer.Option("--allow-change", help="Go on with changed settings.")] = False,
) -> None:
    """Run a recipe, or a sweep of several; the same command goes on after a stop."""
    from scionlm import api
    from scionlm.cli.compare import print_comparison
    from scionlm.cli.tables import print_run
    from scionlm.parallel.ranks import tells_the_user

    path = Path(recipe)
    name = path.stem if path.suffix in (".yaml", ".yml") else path.name  # presets have dots in their names
    folder = out or (path.parent if path.name == "config.yaml" else Path("runs") / name)
    result = api.run(recipe, overrides or [], out=folder, allow_change=allow_change)
    if tells_the_user():
        print_comparison(result, folder) if result["recipe"] == "sweep" else print_run(result, folder)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="Run folder, or the folder of a checkpoint.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the model.")],
    step: Annotated[int | None, typer.Option(help="Step of the checkpoint (default: the newest).", min=0)] = None,
    last: Annotated[int, typer.Option(help="Average so many checkpoints up to that one.", min=1)] = 1,
    averaged: Annotated[bool, typer.Option("--averaged", help="Take the run's own average of the weights.")] = False,
) -> None:
    """Write a checkpoint of a run, finished or not, as a plain Hugging Face model folder."""
    from scionlm import api

    print(api.export(run, out, step=step, last=last, averaged=averaged))


@app.command()
def evaluate(
    model: Model,
    data: Annotated[Path | None, typer.Option(help="Data folder made by scion prepare.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Held-out tokens of each domain (default: all).", min=1)
    ] = None,
    seq_len: Annotated[int, typer.Option(help="Tokens predicted in one window.", min=2)] = 1024,
    per_document: Annotated[bool, typer.Option("--per-document", help="The rolling form of lm-eval.")] = False,
    precision: Annotated[str, typer.Option(help="fp32, bf16 or auto.")] = "fp32",
    domain: Annotated[list[str] | None, typer.Option(help="Only this domain; repeatable.")] = None,
    tasks: Annotated[str | None, typer.Option(help="Tasks of lm-eval or --tasks-dir, as piqa,arc_easy.")] = None,
    suite: Annotated[
        list[str] | None, typer.Option(help="offline (of --data), or a paper's: sheared, tinyllama, ...; repeatable.")
    ] = None,
    tasks_dir: Annotated[Path | None, typer.Option(help="Folder with lm-eval tasks of your own.")] = None,
    allow_task_code: Annotated[
        bool, typer.Option("--allow-task-code", help="Let tasks run code: their own, or what the model writes.")
    ] = False,
    limit: Annotated[int | None, typer.Option(help="Items of each task, from its start.", min=1)] = None,
    num_fewshot: Annotated[int | None, typer.Option(help="Examples before each question.", min=0)] = None,
    batch_size: Annotated[str, typer.Option(help="Inputs in one pass; auto finds one.")] = "auto",
    seed: Annotated[
        int | None, typer.Option(help="Seed of examples and offline items (default: lm-eval's own).", min=0)
    ] = None,
    speed: Annotated[bool, typer.Option("--speed", help="Measure tokens/s, time to first token, cache.")] = False,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Also write the JSON: OUT.json, or a folder.")] = None,
    allow_pickle: Pickle = False,
    json: Json = False,
) -> None:
    """Measure losses on held-out text, scores on tasks, and speed."""
    from scionlm.cli.evaluate import evaluate_command

    options: Any = {
        "seq_len": seq_len, "max_tokens": max_tokens, "per_document": per_document, "precision": precision,
        "domains": domain, "suites": suite or [], "tasks_dir": tasks_dir, "allow_task_code": allow_task_code,
        "limit": limit, "num_fewshot": num_fewshot, "seed": seed, "speed": speed, "allow_pickle": allow_pickle,
    }  # fmt: skip
    evaluate_command(model, data, tasks, batch_size, options, out, json)


@app.command()
def compare(
    items: Annotated[list[str], typer.Argument(metavar="RUN_OR_MODEL...", help="Run or sweep folders, models.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for compare.html, .json and .md.")],
    data: Annotated[Path | None, typer.Option(help="Data folder that models are measured on.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Held-out tokens of each domain for models (default: as in the runs).", min=1)
    ] = None,
    seq_len: Annotated[int | None, typer.Option(help="Window for models (default: as in the runs).", min=2)] = None,
    tasks: Annotated[str | None, typer.Option(help="Also score all of them on these, as piqa,arc_easy.")] = None,
    suite: Annotated[list[str] | None, typer.Option(help="Likewise on a suite; repeatable.")] = None,
    tasks_dir: Annotated[Path | None, typer.Option(help="Folder with lm-eval tasks of your own.")] = None,
    allow_task_code: Annotated[bool, typer.Option("--allow-task-code", help="Let tasks run code.")] = False,
    limit: Annotated[int | None, typer.Option(help="Items of each task.", min=1)] = None,
    num_fewshot: Annotated[int | None, typer.Option(help="Examples before each question.", min=0)] = None,
    speed: Annotated[bool, typer.Option("--speed", help="Also measure how fast they read and write.")] = False,
    json: Json = False,
) -> None:
    """Set runs, sweeps and models side by side: one table, one page."""
    from scionlm import api
    from scionlm.cli.compare import print_comparison, scores_asked
    from scionlm.cli.tables import print_json

    how: Any = {
        "suites": suite or [], "tasks_dir": tasks_dir, "allow_task_code": allow_task_code, "limit": limit,
        "num_fewshot": num_fewshot, "speed": speed,
    }  # fmt: skip
    scores = scores_asked(tasks, how)
    found = api.compare(items, out, data=data, max_tokens=max_tokens, seq_len=seq_len, scores=scores)
    print_json(found) if json else print_comparison(found, out)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="Run folder, or that of a sweep.")],
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", help="RUN/report.html, SWEEP/compare.html; NAME.md for Markdown."),
    ] = None,
) -> None:
    """Write one self-contained page about a run, or about a sweep."""
    from scionlm.report import write_report

    print(write_report(run, out))


@app.command()
def presets(
    name: Annotated[str | None, typer.Argument(help="Print this one as YAML.")] = None,
    corpora: Annotated[bool, typer.Option("--corpora", help="Print its CORPORA.yaml instead.")] = False,
) -> None:
    """List the presets, or print one."""
    from scionlm.cli.tables import print_presets
    from scionlm.recipes.presets import preset_corpora, preset_text

    if name is None:
        print_presets()
    else:
        print(preset_corpora(name) if corpora else preset_text(name), end="")
