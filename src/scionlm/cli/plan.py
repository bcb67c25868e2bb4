"""What `scion plan` prints for people."""

from typing import Any

from scionlm.cli.tables import add_row, new_table, show_table
from scionlm.core.log import format_bytes, format_count, format_seconds
from scionlm.planning.curve import draw
from scionlm.planning.memory import LESS_MEMORY, TIGHT

_SHOWN = 8  # shapes; --json has them all
_POINTS = 16  # of a range test, of which --json has all too


def print_plan(found: dict[str, Any]) -> None:
    """Print a plan: sizes, memory, time, and the learning rate as a curve."""
    models = found["models_trained"]
    origin = f" from {found['source']}" if found["source"] else ""
    known = f" {found['model']}, vocabulary of {found['vocab_size']:,}" if found.get("model") else ""
    table = new_table(f"{found['recipe']}{origin}{known}: {format_count(found['num_parameters'])} parameters", "", "")
    steps = f"{found['num_steps']:,} step{'' if found['num_steps'] == 1 else 's'}"
    add_row(table, "tokens", f"{format_count(found['num_tokens'])} in {steps}")
    also = f", trained {models} times (the control)" if models > 1 and "rounds" not in found else ""
    if "rounds" in found:
        has_control = any(one["name"] == "control" for one in found["rounds"])
        also = f" at the most, for {models - has_control} models" + (", the control aside" if has_control else "")
    add_row(table, "operations", f"{found['flops']:.3g} FLOPs{also}")
    add_row(table, "time", _time(found))
    if "teacher" in found["seconds_by_part"]:
        add_row(table, "teacher", _teacher(found))
    add_row(table, "device hours", _price(found))
    add_row(table, "checkpoint", format_bytes(found["checkpoint_bytes"]))
    add_row(table, "disk", f"{format_bytes(found['disk_bytes'])} at the most")
    if found["epochs"]:
        add_row(table, "passes", ", ".join(f"{name} {times:.2g}" for name, times in found["epochs"].items()))
    show_table(table)
    for key, show in {"budgets": _print_budgets, "candidates": _print_candidates, "rounds": _print_rounds}.items():
        if key in found:
            show(found[key])
    if found.get("published"):
        _print_published(found["published"])
    layout = found["layout"]
    if found["devices"] > 1:
        print(f"\n{found['devices']} devices, {_layout(layout)}: {layout['why']}")
    _print_memory(found)
    _print_curve(found["stages"])
    if "lr_range_test" in found:
        _print_range_test(found["lr_range_test"], found["stages"][0]["lr"])
    for one in found.get("advice", []):
        print(f"\nadvice: {one['what']}\n  {one['why']}" + (f"\n  to do so: {one['set']}" if one["set"] else ""))


def _print_memory(found: dict[str, Any]) -> None:
    rows = found["micro_batch_size"]
    memory = new_table(
        f"\nmemory of a step in {found['precision']}, each device, {rows} sequences a pass", "part", "size"
    )
    for part, size in found["memory_by_part"].items():
        if size:
            add_row(memory, part.replace("_", " "), format_bytes(size))
    add_row(memory, "all", format_bytes(found["memory_bytes_per_device"]))
    if "memory_measured_bytes" in found:
        add_row(memory, "measured", format_bytes(found["memory_measured_bytes"]))
    show_table(memory)
    _warn_of_memory(found)


def _warn_of_memory(found: dict[str, Any]) -> None:
    """Say where a device has too little for a step, or for the source while that is evaluated."""
    there = found["device_memory_bytes"]
    if there and found["memory_bytes_per_device"] > TIGHT * there:
        smaller = {"inheritune": "; or keep fewer layers", "shear": "; or prune further"}.get(found["recipe"], "")
        print(f"warning: {found['device']} has {format_bytes(there)}; less is taken with {LESS_MEMORY}{smaller}")
    source = found["source_memory_bytes"]
    if there and source > TIGHT * there:
        print(
            f"warning: {found['device']} has {format_bytes(there)}; the source takes {format_bytes(source)} of each "
            "while its losses are measured, in float32; train.parallel=fsdp shares it among devices"
        )


def _print_budgets(budgets: list[dict[str, Any]]) -> None:
    table = new_table(
        "\nbudgets of training, evaluations left out", "", "tokens", "a parameter", "FLOPs", "time", "chosen by"
    )
    for one in budgets:
        each, time = f"{one['tokens_per_parameter']:,.1f}", format_seconds(one["seconds"])
        add_row(table, one["name"], format_count(one["tokens"]), each, f"{one['flops']:.3g}", time, one["why"])
    show_table(table)


def _print_published(known: dict[str, Any]) -> None:
    """Print how fast others trained a model of this shape, beside what the table of devices expects."""
    table = new_table(
        f"\npublished: {known['what']} ({known['source']})", "", "tokens/s", f"of the peak of an {known['device']}"
    )
    stated = "" if known["mfu"] is None else f" (stated: {100 * known['mfu']:.0f} %)"
    for name, speed, share in (
        ("published", known["tokens_per_s"], f"{100 * known['utilization']:.1f} %{stated}"),
        ("assumed by plan", known["table_tokens_per_s"], f"{100 * known['table_utilization']:.1f} %"),
    ):
        add_row(table, name, format_count(round(speed)), share)
    show_table(table)
    print(f"shares by {known['formula']}")


def _print_curve(stages: list[dict[str, Any]]) -> None:
    print("\nlearning rate")
    points = [(step, lr) for stage in stages for step, lr in stage["curve"]]
    peak = max(lr for _, lr in points)
    for number, line in enumerate(draw(points)):
        print(f"{f'{peak:.3g}' if number == 0 else '':>8} {line}")
    print(f"{'0':>8} step 1 to {sum(stage['steps'] for stage in stages):,}")
    for stage in stages:
        print(f"{stage['name']}: {stage['schedule']}")


def _print_range_test(test: dict[str, Any], lr: float) -> None:
    """Print the curve of a range test as a table, and what it suggests in the place of a recipe's rate."""
    table = new_table(
        f"\nlearning-rate range test: {test['steps']} steps, each at a higher rate; loss {test['before']:.4f} before",
        "rate", "loss", "change", "",
    )  # fmt: skip
    lrs, smoothed = test["lrs"], test["smoothed"]
    marks = {test["lr_lowest"]: "lowest", test["lr_diverges"]: "clearly higher"}
    every = -(-len(lrs) // _POINTS)
    for number, (rate, loss) in enumerate(zip(lrs, smoothed, strict=True), 1):
        if rate in marks or number % every == 0:
            add_row(table, f"{rate:.2g}", f"{loss:.4f}", f"{loss - test['before']:+.4f}", marks.get(rate, ""))
    show_table(table)
    print(test["why"])
    if test["proposal"] is None:
        print("no proposal")
    else:
        print(f"proposal: optimizer.lr={test['proposal']:g} (the recipe has {lr:g})")


def _print_candidates(shapes: list[dict[str, Any]]) -> None:
    table = new_table(
        "\nshapes within the budget; a run takes the first", "layers", "hidden", "MLP", "heads", "parameters", "why"
    )
    for one in shapes[:_SHOWN]:
        shape = one["shape"]
        heads = f"{shape['num_attention_heads']}/{shape['num_key_value_heads']}"
        sizes = (shape["num_hidden_layers"], shape["hidden_size"], shape["intermediate_size"])
        why = one["why"].split("; ")
        add_row(table, *map(str, sizes), heads, format_count(one["num_parameters"]), f"{why[0]}; {why[-1]}")
    show_table(table)


def _print_rounds(rounds: list[dict[str, Any]]) -> None:
    table = new_table("\nmodels, one after another", "", "parameters", "tokens", "FLOPs", "time")
    for one in rounds:
        size, tokens = format_count(one["num_parameters"]), format_count(one["num_tokens"])
        add_row(table, one["name"], size, tokens, f"{one['flops']:.3g}", format_seconds(one["seconds"]))
    show_table(table)


def print_sweep_plan(found: dict[str, Any]) -> None:
    """Print the plan of a sweep: a row for each run, and what all of them take."""
    runs = found["runs"]
    table = new_table(
        f"sweep of {len(runs)} runs on {found['device']}, one after the other",
        "run", "seed", "parameters", "tokens", "FLOPs", "memory", "time",
    )  # fmt: skip
    for run in runs:
        times = f" x {run['models_trained']}" if run["models_trained"] > 1 and "rounds" not in run else ""
        memory = format_bytes(run["memory_bytes_per_device"])
        add_row(
            table, run["name"], run["seed"], format_count(run["num_parameters"]), format_count(run["num_tokens"]),
            f"{run['flops']:.3g}{times}", memory, format_seconds(run["seconds"]),
        )  # fmt: skip
    add_row(
        table, "all", "", format_count(found["num_parameters"]), format_count(found["num_tokens"]),
        f"{found['flops']:.3g}", format_bytes(found["memory_bytes_per_device"]), format_seconds(found["seconds"]),
    )  # fmt: skip
    show_table(table)
    print(f"device hours: {_price(found)}")
    several = any(run["models_trained"] > 1 and "rounds" not in run for run in runs)
    note = ". x 2: a control is trained too" if several else ""
    aside = ". Controls are in the time alone" if any(run["models_trained"] > 1 for run in runs) else ""
    print(f"all: sums; of parameters and memory the largest{note}{aside}")
    _warn_of_memory(max(runs, key=lambda run: run["memory_bytes_per_device"]))


def _layout(layout: dict[str, Any]) -> str:
    """Return how weights lie on several devices, in words."""
    shards, replicas = layout["shards"], layout["replicas"]
    if layout["name"] == "ddp":
        return f"DDP, {replicas} copies"
    if layout["name"] == "fsdp":
        return f"FSDP2, one copy over {shards}"
    return f"HSDP, {replicas} copies over {shards} each"


def _price(found: dict[str, Any]) -> str:
    """Return the device hours, and their price where it is known."""
    hours = f"{found['device_hours']:,.3g}"
    return hours if "cost" not in found else f"{hours}, {found['cost']:,.2f} at {found['price_per_device_hour']:g} each"


def _time(found: dict[str, Any]) -> str:
    parts = found["seconds_by_part"]
    how = found["seconds_known_from"]
    if how == "device table":
        how = f"{found['device']}, {100 * found['utilization']:.0f} % of {found['peak_flops']:.3g} FLOP/s assumed"
    named = ", ".join(f"{part} {format_seconds(seconds)}" for part, seconds in parts.items())
    return f"{format_seconds(found['seconds'])} ({named}; {how})"


def _teacher(found: dict[str, Any]) -> str:
    """Return what the teacher costs, and what the same time would be without it."""
    parts = found["seconds_by_part"]
    more = parts["teacher"] / parts["training"]
    tokens = format_count(round(found["num_tokens"] * (1 + more)))
    return f"{100 * more:.0f} % on top of training; without it, {tokens} tokens in the same time"
