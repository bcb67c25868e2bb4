"""What page, comparison, card and terminal say of pruning: the numbers as recorded, warnings, hostile records."""

import json
import re
from html import unescape

import pytest

from report.run_folders import DOMAINS, losses, training, write_json, write_metrics
from scionlm.cli.tables import print_run
from scionlm.recipes.card import model_card
from scionlm.report import render_report, write_comparison
from scionlm.report.collect import read_run
from scionlm.report.compare_read import read_rows
from scionlm.report.pruning import pruning_section
from scionlm.report.pruning_charts import finish_of

HOSTILE = "</p><script>alert(1)</script>\u202e"
SHAPE = {
    "num_parameters": 1_711_744, "num_hidden_layers": 2, "hidden_size": 128, "intermediate_size": 344,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
CUT = {
    "hidden_size": {"source": 256, "child": 128},
    "intermediate_size": {"source": 688, "child": 344},
    "num_attention_heads": {"source": 8, "child": 4},
    "num_key_value_heads": {"source": 4, "child": 2},
}
PLAN = {
    "keep": [0, 2], "num_source_layers": 3, "strategy": "masks", "hidden": "0-126,200", "width": "masks",
    "layers": [
        {"index": 0, "heads": "2-5", "kv_heads": "1-2", "ffn": "0-343"},
        {"index": 2, "heads": "0-1,6-7", "kv_heads": "0,3", "ffn": "344-687"},
    ],
}  # fmt: skip
COST = {"steps": 100, "tokens": 102_400, "flops": 2.5e13, "seconds": 61.0}


def axis(name="ffn", **changes):
    record = {
        "name": name, "rows": 3, "units": 688, "target": 344, "kept": ["0-343"] * 3, "open_share": 0.5031,
        "dead_share": 0.0021, "fractional_share": 0.0314, "margin": 0.0421, "distance": 0.0077, "folded": False,
    }  # fmt: skip
    return record | changes


def by_masks(**changes):
    record = {
        "method": "masks", "fidelity": "recommended", "plan": PLAN, "shape": SHAPE, "domains": losses(2.0),
        "settings": {"start": "activation", "constraint": "calibrated", "finish": 0.2},
        "training": COST, "masked": losses(2.0), "checks": ["logits equal those of the masked source"],
        "axes": [axis(), axis("hidden", rows=1, units=256, target=128)],
    }  # fmt: skip
    return record | changes


def by_scores(**changes):
    steps = [COST | {"tokens": 51_200, "shape": SHAPE | {"hidden_size": size}} for size in (192, 128)]
    plan = PLAN | {"strategy": "block_influence", "width": "taylor"}
    return by_masks(method="scores", settings=None, plan=plan, pruning_steps=steps, axes=None, masked=None) | changes


def course(open_share=0.5031, steps=100):
    """Return the metrics of masks that go from open to a share, with a target that is reached after a fifth."""
    for step in range(1, steps + 1):
        done = min(1.0, step / (0.2 * steps))
        place = {"step": step, "tokens": 1024 * step, "train/nll_nats": 4.0 + 0.01 * step}
        shares = {"open_share": 1 - (1 - open_share) * done, "target_share": 1 - 0.5 * done, "margin": 0.1}
        yield place | {f"prune/{name}_{key}": value for name in ("ffn", "hidden") for key, value in shares.items()}
    yield {"step": 0, "tokens": 0} | {f"eval/{name}/nll_nats": nll for name, nll in DOMAINS.items()}
    yield {"step": 50, "tokens": 51_200} | {f"eval/{name}/nll_nats": nll + 1 for name, nll in DOMAINS.items()}


@pytest.fixture
def run(make_run):
    """Return a function that makes the folder of a run that prunes, done or still at it."""

    def run(prune, *, done=True, control=False, metrics=None):
        whole = training(669.0)
        spent = {key: whole[key] + COST[key] for key in COST}
        inherit = {"init": "source", "strategy": "masks", "strategy_reason": "by masks", "keep": [0, 2],
                   "width": {"importance": "masks", "sizes": CUT}}  # fmt: skip
        source = {"name": "big", "num_hidden_layers": 3, "num_parameters": 7_377_152, "domains": losses(0.0)}
        whole |= spent | {"recovery": {key: whole[key] for key in COST}, "pruning": COST}
        changes = {"recipe": "shear", "inherit": inherit, "source": source, "model": SHAPE, "prune": prune}
        folder = make_run(control=control, **changes, training=whole, before=losses(2.0))
        target = {key: value for key, value in SHAPE.items() if key != "num_parameters"}
        config = {"recipe": "shear", "source": "big", "target": target, "prune": {"method": prune.get("method")},
                  "data": {"seq_len": 256}, "seed": 0}  # fmt: skip
        (folder / "config.yaml").write_text(json.dumps(config))
        (folder / "prune").mkdir()
        write_metrics(folder / "prune" / "metrics.jsonl", list(course() if metrics is None else metrics))
        if not done:
            for name in ("result.json", "metrics.jsonl"):
                (folder / name).unlink()
            write_json(folder / "source.json", {"format_version": 1, "domains": losses(0.0)})
            write_json(folder / "status.json", {"format_version": 1, "state": "running", "step": 0})
        return folder

    return run


def words(markup):
    """Return the text of a page, with one space where a block begins or ends."""
    inline = re.sub(r"</?(bdi|b|strong|code)\b[^>]*>", "", str(markup))
    return unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", inline)))


def section(folder):
    return pruning_section(read_run(folder))


def test_what_was_pruned_to_what_at_what_cost(run):
    text = words(section(run(by_masks())))
    for shown in (
        "The source, big (3 layers, 7.4M parameters), was pruned to 2 layers, 128 hidden channels, 344 MLP channels, "
        "4 query heads and 2 key/value heads: 1.7M parameters, 23% of it",
        "128 of 256, 50%", "4 of 8, 50%", "2 of 3, 67%", "by learned masks", "Scion's own", "by activation",
        "102,400, 20% of all", "1 min 1 s", "2.5 \u00d7 10", "logits equal those of the masked source",
    ):  # fmt: skip
        assert shown in text, shown


def test_losses_of_the_source_of_what_is_left_and_after_the_recovery(run):
    folder = run(by_masks())
    page = str(section(folder))
    table = page[page.index("pruning-losses") :]
    means = [sum(loss["nll"] for loss in each.values()) / 3 for each in (losses(0.0), losses(2.0), losses(1.01))]
    rows = [words(row).split() for row in re.findall(r"<tr>.*?</tr>", table)][:5]
    assert [row[-4] for row in rows[1:]] == [f"{means[k]:.3f}" for k in (0, 1, 1, 2)]
    way = 100 * (means[1] - means[2]) / (means[1] - means[0])
    assert f"brings it back to {means[2]:.2f}, {way:.0f}% of the way" in page


def test_an_axis_is_shown_as_recorded_and_settled_masks_are_called_so(run):
    page = str(section(run(by_masks())))
    row = words(page[page.index('scope="row">MLP channels') :].partition("</tr>")[0]).split(">")[1].split()
    assert row == ["MLP", "channels", "344", "of", "688", "3", "50.3%", "/", "50.0%", "0.8%", "0.2%", "3.1%", "0.042"]
    assert "Yes: on every axis" in page
    assert "a close thing" not in page
    assert "banner" not in page


def test_masks_that_met_the_target_half_open_are_not_called_settled_without_more(run):
    text = words(section(run(by_masks(axes=[axis(fractional_share=0.8), axis("hidden")]))))
    assert "In their number, yes: on every axis" in text
    assert "half open (MLP channels 80.0%): which ones stay was a close thing." in text


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dead_share": 0.047}, "dead (MLP channels 4.7%)"),
        ({"distance": 0.0123}, "(MLP channels 1.2% in the row that is furthest off)"),
        ({"dead_share": 0.0101}, "dead (MLP channels 1.0%)"),
    ],
)
def test_masks_that_did_not_settle_are_warned_of(run, changes, said):
    page = str(section(run(by_masks(axes=[axis(**changes), axis("hidden")]))))
    assert "Not everywhere." in page
    assert said in words(page)
    assert 'class="bad"' in page
    assert "Yes: on every axis" not in page


def test_a_warning_says_what_the_constraint_and_the_end_have_to_do_with_it(run):
    dead = [axis(dead_share=0.05)]
    text = words(section(run(by_masks(axes=dead))))
    assert "No. " in text
    assert "The last 20 steps had hard masks" in text
    assert "multiplier_lr" in text


def test_without_hard_masks_and_by_the_published_constraint_dead_units_are_no_surprise(run):
    settings = {"start": "open", "constraint": "published", "finish": 0}
    folded = [axis(dead_share=0.05, folded=True)]
    text = words(section(run(by_masks(axes=folded, settings=settings, fidelity="code"))))
    assert "There was no end with hard masks" in text
    assert "prune.gates.constraint: calibrated" in text
    assert "multiplied into the weights" in text
    assert "as in the published code" in text


def test_the_course_of_each_axis_is_drawn_with_its_target_and_where_masks_got_hard(run):
    folder = run(by_masks())
    page = str(section(folder))
    assert page.count('aria-labelledby="prune-axis-') == 2
    assert "At the end: open 50%, target 50%." in page
    assert "from step 80 on" in page
    lines = re.findall(r'<path d="M[^"]*" class="line ([a-z ]*)"', page[page.index("prune-axis-0-title") :])
    assert lines[:2] == ["plain dashed", "child"]
    pruning = read_run(folder).pruning
    assert pruning is not None
    assert finish_of(pruning) == 80
    assert len(pruning.stretches[0].gates["hidden"]["open_share"]) == 100


def test_losses_while_pruning_end_with_those_under_the_last_masks(run):
    page = str(section(run(by_masks())))
    source, left = (sum(loss["nll"] for loss in losses(offset).values()) / 3 for offset in (0.0, 2.0))
    assert f"held-out: {source:.2f} to {left:.2f}; training: 4.01 to 5.00 nats." in page
    assert f"pruned {left:.2f}" in page


def test_the_map_has_a_cell_for_every_head_of_the_source(run):
    page = str(section(run(by_masks())))
    drawing = page[page.index("kept-map-wide-title") : page.index("kept-map-narrow-title")]
    cells = {
        style: path.count("M")
        for path, style in re.findall(r'<path d="([^"]*)" class="(cell kept|cell|ground)"', drawing)
    }
    assert cells == {"cell kept": 8, "cell": 8, "ground": 8}
    assert "layer 0: heads 2\u20135; layer 1: gone; layer 2: heads 0, 1, 6, 7" in drawing
    assert "share a key/value head stand together, 2 each" in page
    assert "0\u2013126, 200" in page


def test_scores_are_shown_step_by_step_with_their_shapes(run):
    folder = run(by_scores(), metrics=[])
    (folder / "prune" / "metrics.jsonl").unlink()
    for number, loss in ((1, 5.0), (2, 4.5)):
        step = folder / "prune" / f"step-{number:02d}"
        step.mkdir()
        lines = [{"step": k, "tokens": 1024 * k, "train/nll_nats": loss} for k in (0, 50)]
        write_metrics(step / "metrics.jsonl", lines)
    page = str(section(folder))
    text = words(page)
    assert "chosen in 2 steps, measured anew in each" in text
    assert "by taylor, layers by block_influence" in text
    assert re.search(r"step 1 2 192 344 4 2 1.7M 51,200 1 min 1 s step 2 2 128", text)
    assert "training: 5.00 to 4.50" in page
    assert "Did the masks settle?" not in page
    assert "100k" in page[page.index("prune-loss") :]  # the second step goes on where the first one ended


def test_one_step_without_training_needs_no_table(run):
    steps = [{"steps": 0, "tokens": 0, "flops": 0, "seconds": 0.0, "shape": SHAPE}]
    none = {"steps": 0, "tokens": 0, "flops": 0, "seconds": 0.0}
    folder = run(by_scores(pruning_steps=steps, training=none), metrics=[])
    text = words(section(folder))
    assert "chosen in one go" in text
    assert "none: it is not trained" in text
    assert "Step by step" not in text
    assert "Losses while pruning" not in text


def test_while_it_prunes_the_page_says_how_far_it_is(run):
    folder = run(by_masks(), done=False)
    page = words(render_report(folder))
    assert "being pruned (for 102,400 tokens so far)." in page
    assert "Pruning, step 100." in page
    assert "is being pruned to 2 layers, 128 hidden channels" in page
    assert "Not known yet: masks are still being learned." in page
    assert "tokens trained on, all while pruning" in page
    write_json(folder / "prune" / "masks.json", {"format_version": 1, "axes": [axis(dead_share=0.3)], "plan": PLAN})
    assert "are dead (MLP channels 30.0%)" in words(render_report(folder))
    write_json(folder / "prune" / "result.json", {"format_version": 1} | by_masks(axes=[axis(dead_share=0.2)]))
    page = words(render_report(folder))
    assert "are dead (MLP channels 20.0%)" in page
    assert "how much of that the recovery brings back is not known yet" in page


def test_the_rest_of_the_page_counts_both_phases(run):
    folder = run(by_masks())
    write_json(folder / "plan.json", {"format_version": 1, "num_tokens": 3, "models_trained": 2, "rounds": [
        {"name": name, "num_tokens": tokens, "flops": 1e12, "seconds": 60.0}
        for name, tokens in (("pruning", 102_400), ("recovery", 409_600), ("control", 512_000))
    ]})  # fmt: skip
    text = words(render_report(folder))
    for shown in (
        "pruned by learned masks and trained on 512,000 tokens (102,400 of them while pruning)",
        "tokens trained on, 20% of them while pruning", "right after pruning", "Loss over the recovery",
        "tokens 512,000 512,000", f"{512_000 / 730:.0f} tokens/s", "training time 2 min",
    ):  # fmt: skip
        assert shown in text, shown
    assert "before training" not in text


def test_a_run_that_does_not_prune_has_no_such_section(make_run):
    folder = make_run()
    (folder / "prune").mkdir()
    (folder / "prune" / "result.json").write_text(json.dumps({"format_version": 1} | by_masks()))
    page = render_report(folder)
    assert 'id="pruning"' not in page
    assert "before training" in page


def test_nothing_from_a_file_acts_on_the_page(run):
    plan = PLAN | {"strategy": HOSTILE, "width": HOSTILE, "hidden": HOSTILE}
    plan["layers"] = [{"index": 0, "heads": HOSTILE, "kv_heads": HOSTILE, "ffn": HOSTILE}]
    settings = {"start": HOSTILE, "constraint": HOSTILE, "finish": HOSTILE}
    record = by_scores(
        plan=plan, settings=settings, fidelity=HOSTILE, checks=[HOSTILE], axes=[axis(HOSTILE, dead_share=1.0)],
        domains={HOSTILE: {"nll": 3.0}}, masked={HOSTILE: {"nll": 3.0}},
    )  # fmt: skip
    lines = [{"step": 1, "tokens": 9, f"prune/{HOSTILE}_open_share": 0.5, "prune/odd_open_share": 0.5}]
    for method in ("scores", "masks", HOSTILE):
        folder = run(record | {"method": method}, metrics=lines)
        page = render_report(folder)
        assert "<script" not in page
        assert "\u202e" not in page
        assert "&lt;script&gt;" in page
        for path in sorted(folder.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        folder.rmdir()


@pytest.mark.parametrize(
    "broken",
    [
        {"axes": "none"}, {"axes": [None, 3, {}]}, {"axes": [{"name": "ffn"}]}, {"axes": [axis(units=0, target=None)]},
        {"axes": [axis(dead_share=1e400, distance=float("nan"), margin="x", rows=-1)]}, {"settings": 3}, {"plan": []},
        {"settings": {"finish": True}}, {"settings": {"finish": "1e999 steps"}}, {"settings": {"finish": 1e308}},
        {"plan": {"layers": [{"index": 1e400}, {"index": -1}, None, {"index": 2, "heads": "0-999999999,x,-3"}]}},
        {"plan": PLAN | {"num_source_layers": 0}}, {"plan": PLAN | {"num_source_layers": 10**9}},
        {"shape": {"num_attention_heads": 0.5, "num_key_value_heads": 0, "num_hidden_layers": -4}},
        {"shape": None}, {"training": {"tokens": -1e400, "steps": "x"}}, {"training": None}, {"checks": {"a": 1}},
        {"domains": {"prose": {"nll": float("nan")}}}, {"domains": None}, {"masked": [1]}, {"method": None},
        {"pruning_steps": [None, {}, {"shape": 3, "tokens": 1e400}]}, {"pruning_steps": "two"}, {"fidelity": 3},
    ],
)  # fmt: skip
def test_what_is_broken_breaks_no_page(broken, run):
    lines = [*course(), {"step": 101, "tokens": 1, "prune/ffn_open_share": None, "prune/hidden_open_share": 1e300}]
    assert 'id="pruning"' in render_report(run(by_masks(**broken), metrics=lines))


def test_a_comparison_counts_the_tokens_of_pruning_and_says_how_was_pruned(run, tmp_path):
    folder = run(by_masks(), control=True)
    out = tmp_path / "compared"
    rows = {row["name"]: row for row in write_comparison([folder], out)["rows"]}
    assert rows["demo"]["tokens"] == 512_000
    assert rows["demo"]["pruning"] == {"method": "masks", "tokens": 102_400}
    assert rows["demo/control"]["pruning"] is None
    begins = {row.name: row.curve[0][0] for row in read_rows([folder])}
    assert begins == {"demo": 102_400, "demo/control": 0}
    table = (out / "compare.md").read_text()
    assert "(pruned by learned masks)" in table
    assert "count the pruning" in table
    page = (out / "compare.html").read_text()
    assert "begins behind the tokens of its pruning" in page
    (folder / "result.json").unlink()
    write_json(folder / "status.json", {"format_version": 1, "state": "stopped"})
    row = next(row for row in write_comparison([folder], out)["rows"] if row["kind"] == "run")
    assert row["tokens"] == 102_400 + 409_600  # of pruning, and of the recovery so far
    assert row["num_hidden_layers"] == 2


def test_a_comparison_of_others_says_nothing_of_pruning(make_run, tmp_path):
    record = write_comparison([make_run()], tmp_path / "compared")
    assert all(row["pruning"] is None for row in record["rows"])
    for name in ("compare.md", "compare.html"):
        assert "prun" not in (tmp_path / "compared" / name).read_text()


def card_of(folder):
    result = json.loads((folder / "result.json").read_text())
    manifest = json.loads((folder / "manifest.json").read_text())
    return model_card(result, manifest, dict.fromkeys(DOMAINS, 1_000_000))


def test_the_card_says_how_was_pruned_and_counts_both_phases(run):
    card = card_of(run(by_masks(fidelity="paper")))
    for shown in (
        "pruned to its layers 0, 2, hidden_size 128 of 256, intermediate_size 344 of 688", "by masks that were learned",
        "on 102.4k tokens (`fidelity: paper`); then trained", "| source | right after pruning | after training |",
        "512k (102.4k of them while pruning) in 500 steps",
    ):  # fmt: skip
        assert shown in card, shown
    assert "before training" not in card


def test_the_card_names_the_scores(run):
    card = card_of(run(by_scores(), metrics=[]))
    assert "(layers by `block_influence`, heads and channels by `taylor`, in 2 steps)" in card


def test_the_terminal_says_how_was_pruned_and_whether_masks_settled(run, capsys):
    folder = run(by_masks(axes=[axis(dead_share=0.02), axis("hidden"), axis("layers", distance=None)]))
    print_run(json.loads((folder / "result.json").read_text()), folder)
    said = capsys.readouterr().out
    for shown in (
        "big, pruned to 1.712M of 7.377M parameters, 512k tokens in", "child right after pruning",
        "pruned to layers 2 of 3, hidden_size 128 of 256", "pruning took 102.4k of 512k tokens, 1m 01s",
        "masks had not settled: ffn 2.0 % dead, 0.8 % off target; layers 0.2 % dead, not finite off target",
    ):  # fmt: skip
        assert shown in said, shown
    assert "hidden 0.2 % dead" not in said


def test_the_terminal_lists_the_steps_of_scores(run, capsys):
    folder = run(by_scores(), metrics=[])
    print_run(json.loads((folder / "result.json").read_text()), folder)
    said = capsys.readouterr().out
    assert re.search(r"step 1 +2 +192 +344 +4/2 +1\.712M +51\.2k", said)
    assert "masks had not settled" not in said


def test_weights_and_parts_of_the_loss_that_moved_while_pruning_are_drawn_beside_those_of_the_recovery(run):
    def lines(weight):
        for step in (1, 2, 3):
            at = {"step": step, "tokens": 1024 * step, "train/nll_nats": 4.0, "train/loss_nats": 3.0}
            moved = {f"reweight/{name}/weight": weight + step / 100 for name in ("prose", "code")}
            yield at | {"train/divergence_nats": 0.5} | moved

    folder = run(by_masks(), metrics=list(lines(0.1)))
    write_metrics(folder / "metrics.jsonl", list(lines(0.6)))
    page = render_report(folder)
    for said in (
        '<h3 class="sub">While pruning</h3>', '<h3 class="sub">In the recovery</h3>',
        "Parts of the training loss: while pruning",
        "Parts of the training loss: in the recovery", "13.0 %", "63.0 %",
    ):  # fmt: skip
        assert said in page, said
    assert len(set(re.findall(r'id="([^"]+)"', page))) == len(re.findall(r'id="([^"]+)"', page))
