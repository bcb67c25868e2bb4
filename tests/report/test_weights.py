"""The page of a run whose weights moved."""

import json
from types import SimpleNamespace

from scionlm.report.curves import read_curves
from scionlm.report.weights import weight_section

HOSTILE = "</script><b>"


def lines(updates: int):
    for step in range(updates):
        line = {"step": 50 * step, "tokens": 1000 * step}
        for name, weight in (("code", 0.25 + 0.01 * step), (HOSTILE, 0.75 - 0.01 * step)):
            line |= {f"reweight/{name}/weight": weight, f"reweight/{name}/nll_nats": 3.0 - 0.02 * step}
            line |= {f"reweight/{name}/reference_nats": 2.5}
        yield json.loads(json.dumps(line))


def run_with(curves):
    return SimpleNamespace(phases=[("", curves)])


def test_every_move_is_in_the_table_and_nothing_acts():
    section = str(weight_section(run_with(read_curves(lines(7)))))
    for step in range(7):
        assert f'<th scope="row">{50 * step:,}</th><td>{25 + step:.1f} %</td><td>{3 - 0.02 * step:.3f}' in section
    assert "0.500" in section  # the excess of the first
    assert HOSTILE not in section
    assert section.count("<figure") == 2


def test_long_runs_are_thinned_but_keep_their_last_move():
    section = str(weight_section(run_with(read_curves(lines(45)))))
    assert ">2,200</th>" in section
    assert section.count("<tr>") < 60


def test_a_run_whose_weights_stayed_has_no_such_section():
    assert weight_section(run_with(read_curves([{"step": 1, "tokens": 5, "train/nll_nats": 2.0}]))) is None


def test_a_move_without_its_losses_is_shown_as_unknown():
    """As in a control, which follows the weights of its child and measures nothing."""
    curves = read_curves([{"step": 50, "tokens": 9, "reweight/a/weight": 0.5}])
    assert "50.0 %" in str(weight_section(run_with(curves)))
