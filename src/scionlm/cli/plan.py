"""What `scion plan` prints for people."""

from typing import Any

from scionlm.cli.tables import add_row, new_table, show_table
from scionlm.core.log import format_bytes, format_count, format_seconds
from scionlm.planning.curve import draw

_TIGHT = 0.9  # of a device's memory


def print_plan(found: dict[str, Any]) -> None:
    """Print a plan: sizes, memory, time, and the learning rate as a curve."""
    models = found["models_trained"]
    origin = f" from {found['source']}" if found["source"] else ""
    table = new_table(f"{found['recipe']}{origin}: {format_count(found['num_parameters'])} parameters", "", "")
    add_row(table, "tokens", f"{format_count(found['num_tokens'])} in {found['num_steps']:,} steps")
    also = f", trained {models} times (the control)" if models > 1 and "rounds" not in found else ""
    if "rounds" in found:
        also = f" at the most, for {models} models"
    add_row(table, "operations", f"{found['flops']:.3g} FLOPs{also}")
    add_row(table, "time", _time(found))
    if "teacher" in found["seconds_by_part"]:
        add_row(table, "teacher", _teacher(found))
    add_row(table, "checkpoint", format_bytes(found["checkpoint_bytes"]))
    show_table(table)
    if "rounds" in found:
        _print_rounds(found["rounds"])
    layout = found["layout"]
    if found["devices"] > 1:
        print(f"\n{found['devices']} devices, {_layout(layout)}: {layout['why']}")
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
    there = found["device_memory_bytes"]
    if there and found["memory_bytes_per_device"] > _TIGHT * there:
        print(
            f"warning: {found['device']} has {format_bytes(there)}; lower train.micro_batch_size or data.seq_len, or "
            "keep fewer layers"
        )
    print("\nlearning rate")
    points = [(step, lr) for stage in found["stages"] for step, lr in stage["curve"]]
    peak = max(lr for _, lr in points)
    for number, line in enumerate(draw(points)):
        print(f"{f'{peak:.3g}' if number == 0 else '':>8} {line}")
    print(f"{'0':>8} step 1 to {found['num_steps']:,}")
    for stage in found["stages"]:
        print(f"{stage['name']}: {stage['schedule']}")


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
        times = f" x {run['models_trained']}" if run["models_trained"] > 1 else ""
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
    print("all: sums; of parameters and memory the largest. x 2: trained twice, with a control; time counts both")


def _layout(layout: dict[str, Any]) -> str:
    """Return how weights lie on several devices, in words."""
    shards, replicas = layout["shards"], layout["replicas"]
    if layout["name"] == "ddp":
        return f"DDP, {replicas} copies"
    if layout["name"] == "fsdp":
        return f"FSDP2, one copy over {shards}"
    return f"HSDP, {replicas} copies over {shards} each"


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
