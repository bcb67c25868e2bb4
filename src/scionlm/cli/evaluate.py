"""`scion evaluate`: what the flags mean, and results for people."""

from pathlib import Path
from typing import Any

from scionlm.cli.tables import add_row, new_table, print_json, print_losses, print_tasks, show_table
from scionlm.core.errors import UsageError
from scionlm.core.files import require_writable
from scionlm.core.log import format_count
from scionlm.core.records import Record, write_json

_FILE = "evaluation.json"


def evaluate_command(
    model: str, data: Path | None, tasks: str | None, batch_size: str, options: Record, out: Path | None, json: bool
) -> None:
    """Measure a model and print or write what came out.

    Args:
        model: MODEL.
        data: Data folder.
        tasks: Names, with commas between them.
        batch_size: A number, or `auto`.
        options: The other fields of `EvaluateOptions`.
        out: A `.json` file, or a folder; neither may hold an evaluation already.
        json: Print the JSON instead of tables.

    Raises:
        UsageError: A flag is wrong, or `out` is there already.
        StorageError: `out` cannot be written.
    """
    from scionlm import api
    from scionlm.parallel.ranks import tells_the_user

    if batch_size != "auto" and not (batch_size.isdecimal() and int(batch_size) > 0):
        raise UsageError(f"--batch-size {batch_size} must be a number, 1 or more, or auto")
    place = _place(out)
    names = task_names(tasks)
    rows = None if batch_size == "auto" else int(batch_size)
    found = api.evaluate_model(model, data, **options, tasks=names, batch_size=rows)
    if not tells_the_user():
        return
    settings = {"model": model} | {key: options[key] for key in ("seq_len", "per_document", "precision")}
    domains = {name: loss.to_dict() for name, loss in found.losses.items()}
    record = settings | {"domains": domains} | found.record
    if json:
        print_json(record)
    else:
        if domains:
            print_losses(domains, settings)
        _print_found(record)
    if place is not None:  # last: what was measured is on the screen, should it fail
        write_json(place, record)
        if not json:
            print(f"written: {place}")


def task_names(tasks: str | None) -> list[str]:
    """Return the names in `--tasks`.

    Raises:
        UsageError: There are none.
    """
    names = [name for part in (tasks or "").split(",") if (name := part.strip())]
    if tasks is not None and not names:
        raise UsageError("--tasks names no task; give names with commas between them, as piqa,arc_easy")
    return names


def _place(out: Path | None) -> Path | None:
    """Return the file to write."""
    if out is None:
        return None
    place = out if out.suffix == ".json" else out / _FILE
    if place.exists() or (out.suffix != ".json" and out.exists() and not out.is_dir()):
        raise UsageError(f"output {place if place.exists() else out} exists; choose another path")
    require_writable(place.parent)
    return place


def _print_found(record: Record) -> None:
    if record["tasks"]:
        print_tasks(record["tasks"])
    for name, suite in record.get("suites", {}).items():
        mean = "" if suite["mean"] is None else f", mean {100 * suite['mean']:.2f}"
        table = new_table(f"\nsuite {name} ({suite['source']}){mean}", *suite["scores"])
        add_row(table, *("" if score is None else f"{100 * score:.2f}" for score in suite["scores"].values()))
        show_table(table)
    if "inference" in record:
        _print_speed(record["inference"])


def _print_speed(speed: dict[str, Any]) -> None:
    how = speed["settings"]
    table = new_table(
        f"\none sequence, {how['prompt_tokens']} tokens of prompt, {how['new_tokens']} written, {how['dtype']} on "
        f"{how['device']} with {how['threads']} threads, median of {how['repeats']}",
        "",
        "",
    )
    add_row(table, "parameters", format_count(speed["num_parameters"]))
    add_row(table, "weights", f"{speed['weight_bytes'] / 1e6:,.1f} MB")
    add_row(table, "prefill", f"{speed['prefill_tokens_per_second']:,.1f} tokens/s")
    add_row(table, "decode", f"{speed['decode_tokens_per_second']:,.1f} tokens/s")
    add_row(table, "time to first token", f"{speed['time_to_first_token_seconds']:.3f} s")
    window = f" ({speed['window_layers']} layers up to {speed['window']:,} tokens)" if speed["window_layers"] else ""
    add_row(table, "cache", f"{speed['kv_cache_bytes_per_token']:,} bytes a token{window}")
    show_table(table)
