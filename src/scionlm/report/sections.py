"""The rest of the page: where the child comes from, the losses as a table, sample text, the machine, the settings."""

import shlex
from collections.abc import Iterable, Mapping
from typing import Any

from scionlm.report.attention import attention_command
from scionlm.report.collect import Loss, Losses, Run
from scionlm.report.findings import find, known, speed
from scionlm.report.html import Content, Markup, RowGroup, card, clip, facts, name_of, section, table, tag
from scionlm.report.svg import MAX_LAYERS, Caption, layer_strip, responsive
from scionlm.report.values import mapping, number, text
from scionlm.report.wording import (
    NOT_RECORDED,
    duration,
    exact,
    index_ranges,
    nats,
    quantity,
    scientific,
    size,
)

# What a page holds at most; the whole is always in the files of the run. Together they keep a page below 500 kB.
_MAX_DOMAINS, _MAX_SAMPLES, _MAX_SAMPLE, _MAX_CONFIG, _MAX_COMMAND = 40, 8, 1_000, 12_000, 2_000
_MAX_CHANGES = 8

_SHAPE = (
    ("parameters", "num_parameters"),
    ("layers", "num_hidden_layers"),
    ("hidden size", "hidden_size"),
    ("MLP size", "intermediate_size"),
    ("attention heads", "num_attention_heads"),
    ("key/value heads", "num_key_value_heads"),
    ("head size", "head_dim"),
    ("vocabulary", "vocab_size"),
)


def origin_section(run: Run) -> Markup:
    """Return what the child was made from, with the layers that were kept drawn on the source."""
    tied = run.shape.get("tie_word_embeddings")
    shape = [(label, exact(number(run.shape, key))) for label, key in _SHAPE if number(run.shape, key) is not None]
    if isinstance(tied, bool):
        shape.append(("input and output embedding", "tied" if tied else "separate"))
    source = run.source
    about = [
        ("name", name_of(source.name)) if source and source.name else None,
        ("model type", name_of(source.model_type)) if source and source.model_type else None,
        ("parameters", exact(source.num_parameters)) if source and source.num_parameters is not None else None,
        ("layers", f"{source.num_layers:,}") if source and source.num_layers is not None else None,
        ("license", name_of(source.license or NOT_RECORDED)) if source else None,
    ]
    boxes = tag(
        "div",
        tag("div", tag("h3", "The source"), facts(pair for pair in about if pair)) if source else None,
        tag(
            "div",
            tag("h3", "The child"),
            facts(shape) if shape else tag("p", f"Its shape is {NOT_RECORDED} yet."),
        ),
        class_="columns",
    )
    return section("origin", "What was made from what", _origin_words(run), _strip(run), boxes)


def _origin_words(run: Run) -> Markup:
    inherit = run.inherit
    if run.source is None and run.recipe != "scratch":
        return tag("p", f"What it was made from is {NOT_RECORDED} yet.")
    if run.source is None:
        return tag("p", "This model has no source: it was trained from random weights.")
    if inherit.init == "random":
        return tag("p", "Only the shape comes from the source: training began from random weights.")
    if run.continues:
        return tag("p", "Nothing was cut: training went on with all the weights of the source.")
    if not inherit.keep:
        return tag("p", f"Which layers were kept is {NOT_RECORDED}{'' if run.finished else ' yet'}.")
    number_of, total = len(inherit.keep), run.source.num_layers
    kept = clip(index_ranges(inherit.keep), 400)
    parts: list[Content] = [f"The child keeps {number_of:,}{f' of {total:,}' if total else ''} layers: {kept}"]
    if inherit.strategy:
        parts += ["; strategy ", name_of(inherit.strategy)]
    if inherit.reason:
        parts += [": ", tag("bdi", clip(inherit.reason, 400))]
    if inherit.fresh:
        parts += ["; not inherited but initialized anew: ", tag("bdi", clip(", ".join(inherit.fresh), 400))]
    return tag("p", [*parts, "."])


def _strip(run: Run) -> Markup | None:
    total = run.source.num_layers if run.source else None
    keep = run.inherit.keep
    whole = run.continues or run.inherit.init == "random"
    if not total or total > MAX_LAYERS or not keep or max(keep) >= total or whole:
        return None
    described = f"{total} cells, one a layer of the source; kept and filled: {index_ranges(keep)}."
    caption = Caption("layers", "The layers of the source that the child keeps", described)
    picture = responsive(caption, lambda named, width: layer_strip(named, width, total, keep))
    note = "Layers are counted from 0. Filled layers were copied with their weights, in this order."
    if run.inherit.fresh:
        note += " What was initialized anew stands above."
    if run.pruning is not None:
        note += " What is left of each is under Pruning."
    return card(picture, note)


def loss_section(run: Run) -> Markup:
    """Return how the loss is measured, and every final loss as a table."""
    # A dict keeps the order of the names and each of them once.
    names = list({**run.child.after, **run.child.before, **(run.source.losses if run.source else {})})
    if not names:
        unfinished = "No final losses: they are measured on the exported model when a run is done."
        return section("losses", "Losses by domain", tag("p", unfinished))
    groups = [RowGroup(name_of(name), list(_domain_rows(run, name))) for name in names[:_MAX_DOMAINS]]
    if len(known(run.child.after)) > 1:
        groups.insert(0, _mean_group(run))
    header = ("", "nats per token", "perplexity", "bits per byte", "tokens")
    left_out = len(names) - _MAX_DOMAINS
    note = f"{left_out} more domains are in result.json." if left_out > 0 else None
    losses = table("loss-table", "Held-out losses; lower is better", header, groups)
    return section(
        "losses", "Losses by domain", _measured(run), losses, tag("p", note, class_="note") if note else None
    )


def _measured(run: Run) -> Markup:
    seq_len = number(mapping(run.config.get("data")), "seq_len")
    windows = f"windows of {seq_len:.0f} + 1 tokens" if seq_len is not None else "fixed windows"
    return tag(
        "p",
        "A loss is the mean negative log-likelihood per predicted token, in nats, over the packed held-out stream of "
        f"a domain: documents joined by a separator token, read in {windows} that overlap by one, so that each token "
        "but the first is predicted once; separators count. Bits per byte divides by the UTF-8 bytes of the same "
        "documents, so it compares across tokenizers. How many tokens were predicted stands beside every loss. The "
        "losses after training are those of the exported files, loaded again.",
        class_="note",
    )


def _domain_rows(run: Run, name: str) -> Iterable[tuple[Content, ...]]:
    child, control = run.child, run.control
    best, step = child.best.get(name, (None, None))
    after = child.after.get(name, Loss())
    yield from _loss_rows(tag("b", "source", class_="source"), run.source.losses if run.source else {}, name)
    yield from _loss_rows(f"child {run.start}", child.before, name)
    if best is not None and step is not None and after.nll is not None and best < after.nll - 0.005:
        yield from _loss_rows(f"child at its best, step {step:,}", {name: Loss(nll=best)}, name)
    yield from _loss_rows(tag("b", "child after training", class_="child"), child.after, name)
    if control:
        yield from _loss_rows("control before training", control.before, name)
        yield from _loss_rows(tag("b", "control after training", class_="control"), control.after, name)


def _loss_rows(title: Content, losses: Losses, name: str) -> Iterable[tuple[Content, ...]]:
    loss = losses.get(name)
    if loss:
        yield (
            title,
            nats(loss.nll, 3),
            quantity(loss.perplexity),
            nats(loss.bits_per_byte, 3),
            exact(loss.num_tokens),
        )


def _mean_group(run: Run) -> RowGroup:
    finding = find(run)
    values = (
        (tag("b", "source", class_="source"), finding.source),
        (f"child {run.start}", finding.before),
        (tag("b", "child after training", class_="child"), finding.child),
        (tag("b", "control after training", class_="control"), finding.control),
    )
    rows = [(title, nats(value, 3), "", "", "") for title, value in values if value is not None]
    return RowGroup(f"Plain mean over {len(finding.domains)} domains", rows)


def sample_section(run: Run) -> Markup | None:
    """Return what each model writes after the same prompts, side by side."""
    if not run.samples:
        return None if run.finished else section("samples", "Samples", tag("p", "No samples yet."))
    shown = run.samples[:_MAX_SAMPLES]
    left_out = len(run.samples) - len(shown)
    note = (
        "The same prompt continued by each model. Samples show the style of a model; the losses above show its quality."
    )
    more = f" {left_out} more prompts are in result.json." if left_out else ""
    return section(
        "samples",
        "Samples",
        tag("p", note + more, class_="note"),
        [_sample(one.prompt, one.texts) for one in shown],
    )


def _sample(prompt: str, texts: Mapping[str, str]) -> Markup:
    order = [name for name in ("source", "child", "control") if name in texts]
    order += [name for name in texts if name not in order][:2]
    columns = []
    for name in order:
        written = texts[name].removeprefix(prompt)
        goes_on = tag("span", "…", class_="soft", aria_hidden="true")
        words = [goes_on, clip(written, _MAX_SAMPLE)] if written.strip() else tag("span", "(nothing)", class_="soft")
        tone = name if name in {"source", "child", "control"} else None
        columns.append(
            tag(
                "div",
                tag("h4", name_of(name, 40)),
                tag("div", words, class_="words", dir="auto"),
                class_=tone,
            )
        )
    shown = tag("div", clip(prompt, _MAX_SAMPLE) or "(empty: the model begins by itself)", class_="words", dir="auto")
    return tag(
        "article",
        tag("div", tag("span", "Prompt"), shown, class_="prompt"),
        tag("div", columns, class_="texts"),
        class_="sample card",
    )


def machine_section(run: Run) -> Markup:
    """Return how the run was made: amounts, machine, versions, origin of the data, and how to repeat it."""
    groups = (
        ("Training", _training_facts(run)),
        ("Machine", _machine_facts(run)),
        ("Origin", _origin_facts(run)),
    )
    columns = [tag("div", tag("h3", title), facts(pairs)) for title, pairs in groups]
    return section(
        "facts",
        "How it was made",
        tag("div", columns, class_="columns"),
        tag("h3", "Repeat it"),
        *_commands(run),
        attention_command(run),
    )


def _training_facts(run: Run) -> list[tuple[Content, Content]]:
    training = run.child.training
    seed = number(training, "seed")
    seed = number(run.config, "seed") if seed is None else seed
    flops, peak = number(training, "flops"), size(number(training, "peak_memory_bytes"))
    return [
        ("tokens", _if(exact, number(training, "tokens"))),
        ("tokens of pruning", exact(run.pruning.tokens) if run.pruning and run.pruning.tokens else None),
        ("steps", _if(exact, number(training, "steps"))),
        ("time", duration(number(training, "seconds"))),
        ("tokens per second", _if(quantity, speed(run))),
        ("floating-point operations", scientific(flops) if flops is not None else None),
        ("peak memory", peak),
        ("seed", _if(exact, seed) or NOT_RECORDED),
    ]


def _if(shown: Any, value: float | None) -> str | None:
    return shown(value) if value is not None else None


def _layout(training: Mapping[str, Any]) -> Content:
    """Return how many devices trained, and how the weights lay on them, where there were several."""
    devices = number(training, "devices")
    if devices is None or devices < 2:
        return None
    return [f"{devices:.0f}, ", name_of(str(training.get("layout")).upper(), 10)]


def _machine_facts(run: Run) -> list[tuple[Content, Content]]:
    device, training = mapping(run.manifest.get("device")), run.child.training
    versions = mapping(run.manifest.get("versions"))
    threads = number(device, "threads")
    return [
        (
            "device",
            name_of(text(device, "name") or text(device, "kind") or text(training, "device") or NOT_RECORDED),
        ),
        ("threads", exact(threads) if threads is not None else None),
        ("devices", _layout(training)),
        ("precision", name_of(training["precision"]) if training.get("precision") is not None else None),
        ("compiled", _yes_no(training.get("compile"))),
        ("Scion", _named(run.manifest.get("scion_version"))),
        ("git commit", _code(str(run.manifest.get("git_commit") or NOT_RECORDED)[:12])),
        *((name_of(name, 30), _named(version, 30)) for name, version in list(versions.items())[:12]),
        *(("went on with", change) for change in _changes(run)),
    ]


def _changes(run: Run) -> Iterable[Markup]:
    """Return what was another when the run went on later: versions, commit, device."""
    found = run.manifest.get("changes")
    for change in found[:_MAX_CHANGES] if isinstance(found, list) else []:
        changed = mapping(change).get("changed")
        words = ", ".join(str(one) for one in changed) if isinstance(changed, list) else NOT_RECORDED
        yield tag("bdi", clip(f"{words} ({text(mapping(change), 'at') or NOT_RECORDED})", 400))


def _origin_facts(run: Run) -> list[tuple[Content, Content]]:
    data = mapping(run.manifest.get("data"))
    hashes = mapping(run.manifest.get("source"))
    license_ = run.source.license if run.source else None
    return [
        ("started", _named(run.manifest.get("started_at"))),
        ("data", _named(data.get("dir"))),
        ("data fingerprint", _code(data.get("fingerprint"))),
        *(
            (f"source {clip(name, 30)}", _code(value))
            for name, value in list(hashes.items())[:6]
            if isinstance(value, str | int)
        ),
        ("license of the source", name_of(license_ or NOT_RECORDED) if run.source else None),
    ]


def _named(value: object, limit: int = 80) -> Markup | None:
    return name_of(value, limit) if value is not None else None


def _code(value: object) -> Markup | None:
    return tag("code", clip(str(value), 80)) if value is not None else None


def _yes_no(value: object) -> Content:
    return ("yes" if value else "no") if isinstance(value, bool) else _named(value)


def _commands(run: Run) -> list[Content]:
    command = run.manifest.get("command")
    if not isinstance(command, list) or not command:
        return [tag("p", f"The command is {NOT_RECORDED} (no manifest.json).", class_="note")]
    # Between quotes a NUL or an escape sequence would still act; the page shows it as text.
    line = shlex.join(str(word) for word in command)
    return [
        tag("pre", tag("code", clip(line, _MAX_COMMAND)), class_="command"),
        tag(
            "p",
            "Or, with every setting as it was resolved: ",
            tag("code", "scion run config.yaml -o NEW_FOLDER"),
            ".",
            class_="note",
        ),
    ]


def settings_section(run: Run) -> Markup:
    """Return the resolved recipe, folded away."""
    if not run.config_text.strip():
        return section("settings", "Settings", tag("p", "The settings are not here (no config.yaml)."))
    cut = len(run.config_text) > _MAX_CONFIG
    note = tag("p", "Only its beginning; the whole is in config.yaml.", class_="note") if cut else None
    whole = tag("pre", tag("code", clip(run.config_text, _MAX_CONFIG)), tabindex="0")
    return section("settings", "Settings", tag("details", tag("summary", "All settings (config.yaml)"), whole, note))
