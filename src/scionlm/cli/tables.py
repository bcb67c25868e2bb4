"""Results for people, on stdout. Names are printed as they are; nothing interprets markup."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from scionlm.core.log import format_count, format_seconds
from scionlm.core.records import read_json, stderr_key, to_json

_LARGE = 1e6  # a perplexity from which on its digits say nothing
_SETTLED = 0.01  # of the units: beyond it masks had not come to a choice


def print_json(record: dict[str, Any]) -> None:
    """Print one JSON document."""
    print(to_json(record))


def new_table(title: str, *columns: str) -> Table:
    """Print a title and return a table of these columns, the first one of names."""
    print(title)  # not the table's own title, which is wrapped to the table's width
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=any(columns))
    for index, column in enumerate(columns):
        table.add_column(Text(column, style="dim"), justify="left" if index == 0 else "right", overflow="fold")
    return table


def show_table(table: Table) -> None:
    """Print a table."""
    console = Console()
    console = console if console.is_terminal else Console(width=120)
    console.print(table)


def add_row(table: Table, *cells: object) -> None:
    """Add a row; what stands in it is not interpreted."""
    table.add_row(*(Text(str(cell)) for cell in cells))


def print_inspection(facts: dict[str, Any]) -> None:
    """Print what `scion inspect` found."""
    kinds = ", ".join(facts["stored_dtypes"])
    facts = facts | {"stored": f"{kinds}, {facts['num_files']} files, {facts['num_bytes'] / 1e6:,.0f} MB"}
    table = new_table(
        f"{facts['name']}  {facts['model_type']}, {format_count(facts['num_parameters'])} parameters", "", ""
    )
    for key in (
        "num_hidden_layers",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "vocab_size",
        "tie_word_embeddings",
        "max_position_embeddings",
        "stored",
        "license",
        "path",
    ):
        add_row(table, key, facts[key])
    show_table(table)
    parts = new_table("\nparameters", "part", "number", "share")
    for part, number in facts["parameters_by_part"].items():
        add_row(parts, part, f"{number:,}", f"{100 * number / facts['num_parameters']:.1f} %")
    add_row(parts, "all", f"{facts['num_parameters']:,}", "100 %")
    show_table(parts)
    tensors = new_table("\ntensors", "name", "role", "axes", "shape")
    for name, tensor in facts["tensors"].items():
        add_row(tensors, name, tensor["role"], " x ".join(tensor["axes"]), " x ".join(map(str, tensor["shape"])))
    show_table(tensors)
    columns = [key for key in facts["layers"][0] if key not in ("index", "num_parameters")]
    layers = new_table("\nlayers", "layer", *columns, "all")
    for layer in facts["layers"]:
        cells = (f"{value:,}" if isinstance(value := layer[key], int) else value for key in columns)
        add_row(layers, layer["index"], *cells, f"{layer['num_parameters']:,}")
    show_table(layers)


def print_losses(domains: dict[str, dict[str, Any]], settings: dict[str, Any]) -> None:
    """Print what `scion evaluate` found."""
    kind = "each document on its own" if settings["per_document"] else "packed stream"
    title = f"{settings['model']}  ({kind}, windows of {settings['seq_len']}, {settings['precision']})"
    table = new_table(title, "domain", "nll", "perplexity", "bits per byte", "tokens")
    for name, loss in domains.items():
        add_row(table, name, *_loss_cells(loss), loss["num_tokens"])
    show_table(table)


def print_tasks(tasks: dict[str, Any]) -> None:
    """Print scores on tasks, each with its standard error and what guessing comes to."""
    table = new_table("tasks, with standard errors", "task", "metric", "score", "chance", "items", "shots")
    for name, record in tasks.items():
        for metric, value in record.items():
            error = record.get(stderr_key(metric), "none")
            if error == "none" or value is None:
                continue
            shown = _score_cell(record, metric)
            chance = record.get("chance") if metric.startswith("acc") else None
            shots, items = record["num_fewshot"], f"{record['num_items']:,}"
            add_row(table, name, metric, shown, "" if chance is None else f"{chance:.2f}", items, shots)
    show_table(table)


def _loss_cells(loss: dict[str, Any]) -> tuple[str, str, str]:
    perplexity = loss["perplexity"]
    shown = f"{perplexity:.2f}" if perplexity < _LARGE else f"{perplexity:.2e}"
    return f"{loss['nll']:.4f}", shown, f"{loss['bits_per_byte']:.4f}"


def print_data(index: dict[str, Any], out: Path) -> None:
    """Print what `scion prepare` made."""
    table = new_table(
        f"{out}  (tokenizer of {index['tokenizer']['name']})",
        "domain", "documents", "text", "training tokens", "held out", "bytes per token",
    )  # fmt: skip
    for name, splits in index["domains"].items():
        train, held_out = splits["train"], splits["held_out"]
        documents = train["num_documents"] + held_out["num_documents"]
        size, tokens = train["num_bytes"] + held_out["num_bytes"], train["num_tokens"] + held_out["num_tokens"]
        add_row(
            table,
            name,
            f"{documents:,}",
            f"{size / 1e6:.1f} MB",
            f"{train['num_tokens']:,}",
            f"{held_out['num_tokens']:,} in {held_out['num_documents']}",
            f"{size / tokens:.2f}",
        )
    show_table(table)
    if (out / "statistics.json").exists():
        left_out = _left_out(read_json(out / "statistics.json")["domains"])
        print("\n".join([*left_out, f"page: {out / 'report.html'}"]))


def _left_out(domains: dict[str, Any]) -> list[str]:
    """Return a line for each domain of which something was left out."""
    lines: list[str] = []
    for name, facts in domains.items():
        counts = {f"{kind} duplicates": count for kind, count in facts["duplicates"].items()}
        counts |= {f"skipped ({kind})": count for kind, count in facts["skipped"].items()}
        words = [f"{count:,} {what}" for what, count in counts.items() if count]
        if facts["limit"]:
            words.append(f"cut at {facts['limit']}")
        if words:
            lines.append(f"{name}: {', '.join(words)}")
    return lines


def print_presets() -> None:
    """Print the names of the presets with the first line of each."""
    from scionlm.recipes.presets import preset_names, preset_summary

    table = new_table("presets  (scion presets NAME prints one)", "name", "")
    table.columns[1].justify = "left"
    for name in preset_names():
        add_row(table, name, preset_summary(name))
    show_table(table)


def print_run(result: dict[str, Any], out: Path) -> None:
    """Print a finished run: losses of source, child and control, the gap closed, rounds, and where everything is."""
    source, training, control = result["source"], result["training"], result.get("control")
    prune = result.get("prune")
    rows: list[tuple[str, dict[str, Any]]] = [
        (f"{result['name']} {'right after pruning' if prune else 'before training'}", result["before"]),
        (f"{result['name']} after", result["domains"]),
    ]
    if source:
        rows.insert(0, (f"source ({source['num_hidden_layers']} layers)", source["domains"]))
    if control:
        rows.append(("control after", control["domains"]))
    title = f"{_what(result)}, {format_count(training['tokens'])} tokens in {format_seconds(training['seconds'])}"
    table = new_table(title, "held-out nll (nats)", *result["domains"], "mean")
    for name, domains in rows:
        values = [domains[domain]["nll"] for domain in result["domains"]]
        add_row(table, name, *(f"{value:.3f}" for value in values), f"{sum(values) / len(values):.3f}")
    show_table(table)
    print()
    if result.get("tasks"):
        _print_scores(result)
    if result.get("growth"):
        _print_rounds(result["growth"])
    if prune:
        _print_pruning(result)
    if result.get("forgetting"):
        _print_forgetting(result["forgetting"])
    if result["inherit"] and result["inherit"]["init"] == "source" and result["recipe"] != "continual":
        kept = ", ".join(map(str, result["inherit"]["keep"]))
        print(f"layers kept: {kept}  ({result['inherit']['strategy']}: {result['inherit']['strategy_reason']})")
    if control:
        print(_beside_control(result["name"], {name: _mean(domains) for name, domains in rows}, control["num_seeds"]))
    measuring = training.get("evaluation_seconds")
    if measuring and training["seconds"]:
        counts = sorted({loss["num_tokens"] for loss in result["domains"].values()})
        tokens = " to ".join(f"{count:,}" for count in (*counts[:1], *counts[1:][-1:]))
        share = 100 * measuring / (measuring + training["seconds"])
        print(
            f"held-out losses are of {tokens} tokens a domain; measuring them on the way took "
            f"{format_seconds(measuring)}, {share:.0f} % of the time"
        )
    print(f"model:  {out / 'model'}\nreport: {out / 'report.html'}")


def _print_scores(result: dict[str, Any]) -> None:
    """Print the scores of source, result and control on the tasks of a run."""
    models = {"source": result["source"] or {}, result["name"]: result, "control": result.get("control") or {}}
    models = {name: record["tasks"] for name, record in models.items() if record.get("tasks")}
    table = new_table("tasks, with standard errors", "task", "metric", *models, "chance", "items")
    for task, record in result["tasks"].items():
        metric = record.get("metric", "acc")
        cells = [_score_cell(tasks.get(task, {}), metric) for tasks in models.values()]
        chance = record.get("chance")
        add_row(table, task, metric, *cells, "" if chance is None else f"{chance:.2f}", record["num_items"])
    show_table(table)
    print()


def _score_cell(record: dict[str, Any], metric: str) -> str:
    value, error = record.get(metric), record.get(stderr_key(metric))
    return "" if value is None else f"{value:.3f}" + ("" if error is None else f" ± {error:.3f}")


def _print_forgetting(record: dict[str, Any]) -> None:
    """Print what was forgotten and what was learned."""
    old, new = record["upstream"], record["downstream"]
    words: list[str] = []
    if new:
        words.append(f"downstream ({', '.join(new['domains'])}) {new['before']:.3f} to {new['after']:.3f}")
    if old:
        peak = f", at most {old['peak']['nll']:.3f} on the way" if old["peak"] else ""
        words.append(f"upstream ({', '.join(old['domains'])}) {old['before']:.3f} to {old['after']:.3f}{peak}")
    if words:
        print(f"nats: {'; '.join(words)}")
    if old and new:
        print(f"forgets {old['forgetting']:+.3f}, gains {new['adaptation']:+.3f}: net {record['net']:+.3f}")
    for stage in record.get("stages", []):
        print(
            f"stage {stage['name']} ({', '.join(stage['domains'])}): {stage['before']:.3f} before, "
            f"{stage['at_its_end']:.3f} at its end, {stage['after']:.3f} at the end"
        )


def _mean(domains: dict[str, Any]) -> float:
    return sum(loss["nll"] for loss in domains.values()) / len(domains)


def _what(result: dict[str, Any]) -> str:
    """Return what a run made, of what."""
    source, layers = result["source"], result["model"]["num_hidden_layers"]
    if not source:
        return f"{format_count(result['model']['num_parameters'])} parameters in {layers} layers, from scratch"
    if result["recipe"] == "continual":
        return f"{source['name']}, gone on with"
    if result.get("prune"):
        many = " of ".join(format_count(each["num_parameters"]) for each in (result["model"], source))
        return f"{source['name']}, pruned to {many} parameters"
    if result["inherit"]["init"] == "source":
        return f"{layers} of {source['num_hidden_layers']} layers of {source['name']}"
    return f"{layers} random layers in the shape of {source['num_hidden_layers']} of {source['name']}"


def _print_pruning(result: dict[str, Any]) -> None:
    """Print what was cut and how, the steps in which it was, and whether masks had settled."""
    from scionlm.recipes.card import chosen_words

    prune, spent = result["prune"], result["training"]
    steps = prune.get("pruning_steps") or []
    if len(steps) > 1:
        table = new_table("steps of pruning", "", "layers", "hidden", "MLP", "heads", "parameters", "tokens")
        for number, step in enumerate(steps, 1):
            shape = step["shape"]
            heads = f"{shape['num_attention_heads']}/{shape['num_key_value_heads']}"
            sizes = [shape[key] for key in ("num_hidden_layers", "hidden_size", "intermediate_size")]
            counts = [format_count(value) for value in (shape["num_parameters"], step["tokens"])]
            add_row(table, f"step {number}", *sizes, heads, *counts)
        show_table(table)
        print()
    width = (result["inherit"].get("width") or {}).get("sizes", {})
    cuts = [f"{name} {size['child']} of {size['source']}" for name, size in width.items()]
    cuts.insert(0, f"layers {len(result['inherit']['keep'])} of {result['source']['num_hidden_layers']}")
    print(f"pruned to {', '.join(cuts)}: {chosen_words(prune).replace('`', '')}")
    if prune["training"]["tokens"]:
        before = f"{format_count(prune['training']['tokens'])} of {format_count(spent['tokens'])} tokens"
        print(f"pruning took {before}, {format_seconds(prune['training']['seconds'])}")
    for line in _unsettled(prune.get("axes") or []):
        print(line)


def _unsettled(axes: list[dict[str, Any]]) -> list[str]:
    """Return a line on masks that had not come to a choice; see the report for what it means."""
    named: list[str] = []
    for axis in axes:
        dead, distance = axis.get("dead_share"), axis.get("distance")  # null where they were not finite
        if dead is None or distance is None or dead > _SETTLED or distance > _SETTLED:
            shown = ["not finite" if share is None else f"{100 * share:.1f} %" for share in (dead, distance)]
            named.append(f"{axis['name']} {shown[0]} dead, {shown[1]} off target")
    return [f"masks had not settled: {'; '.join(named)} (the report says what that means)"] if named else []


def _beside_control(name: str, means: dict[str, float], seeds: int) -> str:
    """Return how far a model is from its control, and how much of the control's gap to the source that closes."""
    child, other = means[f"{name} after"], means["control after"]
    top = next(iter(means.values()))
    where = f"{abs(other - child):.3f} nats {'below' if child <= other else 'above'}"
    closed = ""
    if other > top:
        closed = f", and closes {100 * (other - child) / (other - top):.0f} % of its gap to the source"
    spread = f"({seeds} seed: no spread known)"
    return f"the {name} is {where} the control of the same shape, tokens and order{closed} {spread}"


def _print_rounds(growth: dict[str, Any]) -> None:
    """Print what each round of growth was, cost and showed, beside the reference."""
    reference = growth["reference"]
    decided = f"{sum(reference['num_tokens'].values()):,} held-out tokens in {reference['num_sequences']:,} windows"
    table = new_table(
        f"rounds, on {decided}", "", "layers", "nll", "less the reference's", "tokens", "FLOPs", "time"
    )  # fmt: skip
    add_row(
        table,
        f"reference {reference['name']}",
        str(reference["layers"]),
        f"{reference['nll']:.4f}",
        "",
        *_costs(reference),
    )
    for one in growth["rounds"]:
        difference = one["difference"]
        interval = "" if difference["low"] is None else f" ({difference['low']:+.4f} to {difference['high']:+.4f})"
        shown = f"{difference['mean']:+.4f}{interval}"
        add_row(table, f"round {one['round']}", str(one["layers"]), f"{one['nll']:.4f}", shown, *_costs(one))
    add_row(table, "all rounds", "", "", "", *_costs(growth["total"]))
    show_table(table)
    print(f"\n{growth['why']}; the result is round {growth['result_round']}'s")


def _costs(record: dict[str, Any]) -> tuple[str, str, str]:
    tokens, flops, seconds = (record.get(key) for key in ("tokens", "flops", "seconds"))
    return (
        "" if tokens is None else format_count(tokens),
        "" if flops is None else f"{flops:.2e}",
        "" if seconds is None else format_seconds(seconds),
    )
