"""Reference losses by a scaling fit: the published ones again, curves that are known, and tables that are broken."""

import contextlib
import itertools
import json
import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scionlm.core.errors import DataError, ScionError, UsageError
from scionlm.core.records import to_json
from scionlm.data.mixing import references
from scionlm.data.mixing.loss_tables import STANDARD_ERROR, LossTable, load_table, parse_size
from scionlm.data.mixing.references import fit, intervals, reference_document

quick = settings(max_examples=60)

# LLaMA2 on the held-out parts of RedPajama, and what LLM-Shearing (2310.06694) took from them as references.
SIZES = (6_738_415_616, 13_015_864_320, 68_976_648_192)
LLAMA2 = {
    "cc": (1.7520, 1.6680, 1.4621),
    "github": (0.6216, 0.5791, 0.4890),
    "book": (1.9063, 1.8242, 1.6450),
    "stackexchange": (1.4482, 1.3936, 1.2805),
    "wiki": (1.4844, 1.3945, 1.2118),
    "arxiv": (1.2637, 1.2109, 1.1148),
    "c4": (1.9219, 1.8486, 1.6848),
}
TARGETS = {"1.3B": 1_345_423_360, "2.7B": 2_701_560_320, "370M": 373_867_520}
PUBLISHED = {
    "1.3B": (1.9643, 0.7459, 2.1393, 1.6117, 1.7590, 1.4449, 2.1251),
    "2.7B": (1.8712, 0.6883, 2.0325, 1.5353, 1.6297, 1.3560, 2.0328),
    "370M": (2.1401, 0.8694, 2.3625, 1.7791, 2.0470, 1.6637, 2.3139),
}
CURVES = {  # alpha and E of the same fits
    "cc": (0.0283, -2.798),
    "github": (0.1551, 0.184),
    "book": (0.1294, 0.901),
    "stackexchange": (0.1756, 0.948),
    "wiki": (0.1925, 0.729),
    "arxiv": (0.2913, 0.961),
    "c4": (0.1088, 0.861),
}
TABLE = LossTable(
    source="table.yaml",
    losses={domain: dict(zip(SIZES, losses, strict=True)) for domain, losses in LLAMA2.items()},
    targets=TARGETS,
    standard_error=STANDARD_ERROR,
)


def predictions(losses=LLAMA2):
    fits = [fit(SIZES, values, bounded=False) for values in losses.values()]
    return {name: [found.predict(size) for found in fits] for name, size in TARGETS.items()}


def matches(found):
    return {
        (target, domain)
        for target, values in PUBLISHED.items()
        for domain, published, value in zip(LLAMA2, values, found[target], strict=True)
        if round(value, 4) == published
    }


def test_the_published_references_are_reproduced_to_their_last_digit():
    assert len(matches(predictions())) == 21
    document = reference_document(TABLE, False, TARGETS)["references"]
    found = {name: [value["nll"] for value in domains.values()] for name, domains in document.items()}
    assert found == predictions()


@pytest.mark.parametrize("domain", LLAMA2)
@pytest.mark.parametrize("index", range(3))
@pytest.mark.parametrize("shift", [-0.01, 0.01])
def test_a_hundredth_of_a_nat_in_one_loss_moves_the_references_of_that_domain_alone(domain, index, shift):
    """The control: the published numbers are no accident of the tolerance."""
    losses = list(LLAMA2[domain])
    losses[index] += shift
    assert matches(predictions(LLAMA2 | {domain: losses})) == {
        (target, other) for target in TARGETS for other in LLAMA2 if other != domain
    }


@pytest.mark.parametrize("domain", LLAMA2)
def test_the_published_exponents_and_floors_are_reproduced(domain):
    alpha, floor = CURVES[domain]
    found = fit(SIZES, LLAMA2[domain], bounded=False)
    assert round(found.alpha, 4) == alpha
    assert abs(found.E - floor) < 1.1e-3  # the note that quotes them cut one of them off instead of rounding it
    assert found.rms < 1e-12  # three points and three parameters
    assert not found.bound_active
    assert any("exactly determined" in text for text in found.warnings)
    assert any("E is negative" in text for text in found.warnings) == (domain == "cc")


@pytest.mark.parametrize("domain", LLAMA2)
def test_the_bound_moves_only_the_domain_whose_floor_would_be_negative(domain):
    free, bounded = fit(SIZES, LLAMA2[domain], bounded=False), fit(SIZES, LLAMA2[domain])
    if domain != "cc":
        assert bounded == free
        assert bounded.E > 0
        return
    assert (bounded.E, bounded.bound_active) == (0.0, True)
    assert bounded.rms > 1e-4  # it misses the points now, so there is a residual to judge it by
    assert [text.split(":")[0] for text in bounded.warnings] == ["degenerate"]
    assert [round(bounded.predict(size), 4) for size in TARGETS.values()] == [1.9881, 1.8829, 2.1967]


def by_brute_force(sizes, losses, bounded):
    """Return the least squared error over a fine grid of alpha, solved by numpy's own least squares."""
    best = math.inf
    for alpha in np.exp(np.linspace(math.log(1e-3), math.log(5), 3000)):
        power = (np.array(sizes) / sizes[0]) ** -alpha
        design = np.stack([power, np.ones_like(power)], axis=1)
        (scale, floor), *_ = np.linalg.lstsq(design, losses, rcond=None)
        if bounded and floor < 0:
            (scale,), *_ = np.linalg.lstsq(design[:, :1], losses, rcond=None)
            floor = 0.0
        best = min(best, float(((np.array(losses) - scale * power - floor) ** 2).sum()))
    return best


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("bounded", [True, False])
def test_with_more_sizes_than_parameters_it_is_the_least_squares_solution(seed, bounded):
    rng = np.random.default_rng(seed)
    sizes = sorted(int(size) for size in 10 ** rng.uniform(8, 11, size=6))
    floor = 0.0 if seed % 2 else 1.2
    losses = [3.0 * (size / sizes[0]) ** -0.2 + floor + rng.normal(0, 0.02) for size in sizes]
    found = fit(sizes, losses, bounded)
    oracle = by_brute_force(sizes, losses, bounded)
    error = len(sizes) * found.rms**2
    assert error <= oracle * (1 + 1e-9)
    assert error >= oracle * (1 - 0.05)  # the grid of the oracle is coarse
    residual = [found.predict(size) - loss for size, loss in zip(sizes, losses, strict=True)]
    assert math.sqrt(np.mean(np.square(residual))) == pytest.approx(found.rms, rel=1e-9)
    assert not any("exactly determined" in text for text in found.warnings)


@st.composite
def exact_curves(draw):
    """A curve that is known and the sizes at which it is read; each size is at least 1.7 times the one before."""
    steps = draw(st.lists(st.floats(1.7, 6), min_size=2, max_size=6))
    sizes = [draw(st.integers(10**6, 10**10))]
    for step in steps:
        sizes.append(int(sizes[-1] * step))
    return sizes, draw(st.floats(0.1, 4)), draw(st.floats(0.03, 1.0)), draw(st.floats(0.0, 3.0))


@quick
@given(exact_curves(), st.booleans(), st.floats(0.1, 10))
def test_a_curve_that_is_known_is_recovered(curve, bounded, times):
    sizes, scale, alpha, floor = curve

    def known(size):
        return scale * (size / sizes[0]) ** -alpha + floor

    found = fit(sizes, [known(size) for size in sizes], bounded)
    assert found.alpha == pytest.approx(alpha, rel=1e-5)
    assert abs(found.E - floor) < 1e-4
    assert found.A / sizes[0] ** found.alpha == pytest.approx(scale, rel=1e-4)
    assert found.predict(times * sizes[0]) == pytest.approx(known(times * sizes[0]), rel=1e-6)


@st.composite
def falling_losses(draw):
    drops = draw(st.lists(st.floats(0.01, 1), min_size=2, max_size=5))
    losses = [draw(st.floats(0.2, 3))]
    for drop in drops:
        losses.append(losses[-1] + drop)
    sizes = draw(st.lists(st.integers(10**6, 10**11), min_size=len(losses), max_size=len(losses), unique=True))
    return sorted(sizes), losses[::-1]


@quick
@given(falling_losses(), st.booleans())
def test_a_prediction_falls_with_the_size_and_is_finite_wherever_it_is_made(curve, bounded):
    sizes, losses = curve
    found = fit(sizes, losses, bounded)
    assert found.A > 0
    assert found.alpha > 0
    values = [found.predict(size) for size in np.geomspace(sizes[0] / 5, sizes[-1] * 5, 30)]
    assert all(math.isfinite(value) for value in values)
    assert all(later <= earlier for earlier, later in itertools.pairwise(values))
    assert values[-1] < values[0]
    if bounded:
        assert found.E >= 0
        assert min(values) > 0


@quick
@given(falling_losses(), st.booleans(), st.randoms())
def test_the_order_of_the_sizes_has_no_part_in_it(curve, bounded, random):
    pairs = list(zip(*curve, strict=True))
    random.shuffle(pairs)
    sizes, losses = [size for size, _ in pairs], [loss for _, loss in pairs]
    expected = fit(curve[0], curve[1], bounded).predict(10**9)
    assert fit(sizes, losses, bounded).predict(10**9) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("losses", [(1.0, 1.1, 1.2), (1.7, 1.7, 1.7), (1.0, 3.0, 2.1)])
@pytest.mark.parametrize("bounded", [True, False])
def test_losses_that_do_not_fall_have_no_curve(losses, bounded):
    with pytest.raises(DataError, match="do not fall"):
        fit(SIZES, losses, bounded)
    table = LossTable("here.yaml", {"prose": dict(zip(SIZES, losses, strict=True))}, TARGETS, 0.0)
    with pytest.raises(DataError, match=r"here\.yaml: losses\.prose: .*do not fall"):
        reference_document(table, bounded, TARGETS)


def test_curves_at_the_ends_of_the_search_say_so():
    straight = [3 - 0.1 * math.log(size / SIZES[0]) for size in SIZES]  # no power law bends as little
    assert any("lower end" in text for text in fit(SIZES, straight, bounded=False).warnings)
    assert any("upper end" in text for text in fit(SIZES, [3.0, 2.0, 2.0]).warnings)
    assert not any("end of its range" in text for text in fit(SIZES, LLAMA2["c4"]).warnings)


@pytest.mark.parametrize("bounded", [True, False])
def test_an_interval_holds_its_estimate_and_widens_with_the_standard_error(bounded):
    widths = []
    for error in (0.0, 0.001, 0.003, 0.01):
        table = LossTable("t", TABLE.losses, TARGETS, error)
        found = reference_document(table, bounded, TARGETS)
        assert found["standard_error"] == error
        values = [value for domains in found["references"].values() for value in domains.values()]
        assert all(value["low"] <= value["nll"] <= value["high"] for value in values)
        widths.append([value["high"] - value["low"] for value in values])
    assert max(widths[0]) < 1e-9
    for narrow, wide in itertools.pairwise(widths):
        assert all(b > a for a, b in zip(narrow, wide, strict=True))


def test_an_interval_covers_what_it_promises():
    """Tables of noisy losses from one known curve: about nine in ten intervals hold the truth."""

    def known(size):
        return 2.0 * (size / 10**9) ** -0.3 + 1.0

    sizes = [10**9, 2 * 10**9, 5 * 10**9, 2 * 10**10, 10**11]
    rng = np.random.default_rng(3)
    held = 0
    for _ in range(60):
        noisy = [known(size) + rng.normal(0, 0.01) for size in sizes]
        low, high = intervals(sizes, noisy, [3 * 10**8], 0.01)[0]
        held += low <= known(3 * 10**8) <= high
    assert 46 <= held <= 58


def test_the_intervals_are_the_same_at_every_call_and_far_targets_are_less_certain():
    one = intervals(SIZES, LLAMA2["wiki"], list(TARGETS.values()), 0.004)
    assert (one == intervals(SIZES, LLAMA2["wiki"], list(TARGETS.values()), 0.004)).all()
    width = dict(zip(TARGETS, one[:, 1] - one[:, 0], strict=True))
    assert width["2.7B"] < width["1.3B"] < width["370M"]


def test_the_document_is_json_and_says_all_there_is_to_know():
    started = time.monotonic()
    found = reference_document(TABLE, True, TARGETS)
    assert time.monotonic() - started < 5  # a fraction of a second; the rest is for a busy machine
    assert json.loads(to_json(found)) == {"format_version": 1} | found
    assert (found["bounds"], found["equation"]) == ("positive", references.EQUATION)
    assert reference_document(TABLE, False, TARGETS)["bounds"] == "none"
    assert found["sizes"] == {domain: list(SIZES) for domain in LLAMA2}
    assert found["targets"] == TARGETS
    assert list(found["references"]) == list(TARGETS)
    assert set(found["references"]["1.3B"]["cc"]) == {"nll", "low", "high"}
    assert set(found["fits"]["cc"]) == {"A", "alpha", "E", "bound_active", "rms", "warnings"}
    curve = found["fits"]["wiki"]
    value = curve["A"] / 1_345_423_360 ** curve["alpha"] + curve["E"]
    assert value == pytest.approx(found["references"]["1.3B"]["wiki"]["nll"], abs=1e-9)


def test_a_target_far_outside_the_sizes_is_called_an_extrapolation():
    def said(**targets):
        warnings = reference_document(TABLE, True, targets)["fits"]["c4"]["warnings"]
        return [text for text in warnings if text.startswith("extrapolation")]

    assert said(near=SIZES[0] // 9, inside=2 * 10**10, above=9 * SIZES[-1]) == []
    assert said(small=SIZES[0] // 18) == [
        "extrapolation: small is 18 times smaller than the smallest size of the table"
    ]
    assert said(huge=SIZES[-1] * 20) == ["extrapolation: huge is 20 times larger than the largest size of the table"]


# Tables as files.

LOSSES = {"cc": {"6.7B": 1.752, "13_015_864_320": 1.668, "68976648192": 1.4621}}
CSV = "parameters,cc,wiki\n6.7B,1.752,1.4844\n13015864320,1.668,1.3945\n30B,,1.3\n68976648192,1.4621,1.2118\n"


def written(folder, content, name="table.json"):
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def test_the_three_formats_say_the_same(tmp_path):
    content = {"losses": LOSSES, "targets": {"1.3B": "1_345_423_360", "small": 370_000_000}, "standard_error": 0.01}
    text = (
        "losses:\n  cc: {6.7B: 1.752, 13015864320: 1.668, 68_976_648_192: 1.4621}\n"
        "targets: {1.3B: 1345423360, small: 370M}\nstandard_error: 1e-2\n"
    )
    expected = {"cc": {6_700_000_000: 1.752, 13_015_864_320: 1.668, 68_976_648_192: 1.4621}}
    for path in (written(tmp_path, content), written(tmp_path, text, "t.yaml"), written(tmp_path, text, "t.YML")):
        table = load_table(path)
        assert table.losses == expected
        assert table.targets == {"1.3B": 1_345_423_360, "small": 370_000_000}
        assert table.standard_error == 0.01
        assert table.source == str(path)
    for text in (CSV, "\ufeff" + CSV.replace("\n", "\r\n"), CSV.replace(",", " , ") + "\n\n"):
        table = load_table(written(tmp_path, text, "t.csv"))
        assert table.losses["cc"] == expected["cc"]
        assert list(table.losses["wiki"]) == [6_700_000_000, 13_015_864_320, 30_000_000_000, 68_976_648_192]
        assert (table.targets, table.standard_error) == ({}, STANDARD_ERROR)


def test_sizes_come_out_rising_whatever_their_order(tmp_path):
    path = written(tmp_path, {"losses": {"cc": {"70B": 1.0, "7B": 2.0, "13B": 1.5}}})
    assert list(load_table(path).losses["cc"]) == [7 * 10**9, 13 * 10**9, 70 * 10**9]


def test_a_table_that_is_not_there_and_a_name_that_says_nothing_are_wrong_requests(tmp_path):
    with pytest.raises(UsageError, match=r"nowhere\.yaml does not exist"):
        load_table(tmp_path / "nowhere.yaml")
    with pytest.raises(UsageError, match=r"table\.txt.*\.yaml, \.json or \.csv"):
        load_table(written(tmp_path, "losses: {}", "table.txt"))
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(ScionError, match=r"folder\.json.*folder"):
        load_table(tmp_path / "folder.json")


def curve(**changes):
    return {"losses": {"cc": LOSSES["cc"] | changes}}


BROKEN = {
    "two sizes": ({"losses": {"cc": {"1B": 2.0, "2B": 1.9}}}, r"losses\.cc has 2 sizes, a curve needs 3"),
    "a negative loss": (curve(**{"6.7B": -1}), r"losses\.cc\.6\.7B: '-1' is not a loss"),
    "a loss of nothing": (curve(**{"6.7B": 0}), r"losses\.cc\.6\.7B: '0' is not a loss"),
    "NaN": (curve(**{"6.7B": math.nan}), r"losses\.cc\.6\.7B: 'NaN' is not a loss"),
    "infinity": (curve(**{"6.7B": math.inf}), r"losses\.cc\.6\.7B: 'Infinity' is not a loss"),
    "a loss beyond reason": (curve(**{"6.7B": 1e300}), r"losses\.cc\.6\.7B"),
    "a word for a loss": (curve(**{"6.7B": "low"}), r"losses\.cc\.6\.7B: 'low' is not a loss"),
    "a truth for a loss": (curve(**{"6.7B": True}), r"losses\.cc\.6\.7B: true is not a loss"),
    "null for a loss": (curve(**{"6.7B": None}), r"losses\.cc\.6\.7B: null is not a loss"),
    "a list for a loss": (curve(**{"6.7B": [1, 2]}), r"losses\.cc\.6\.7B"),
    "a mapping for a loss": (curve(**{"6.7B": {"x": 1}}), r"losses\.cc\.6\.7B: a mapping is not a loss"),
    "a size twice, in two ways": (curve(**{"6_700M": 1.7}), r"losses\.cc: size '6_700M' \(6,700,000,000 .*twice"),
    "a size twice": ('{"losses": {"cc": {"1B": 2, "2B": 1.9, "1B": 1.8}}}', r"losses\.cc: key '1B' stands twice"),
    "a domain twice": ('{"losses": {"cc": {}, "cc": {}}}', r"losses: key 'cc' stands twice"),
    "a size that is none": (curve(huge=1.0), r"losses\.cc: size 'huge' is not one such as"),
    "a size of nothing": (curve(**{"0": 1.0}), r"losses\.cc: size '0'"),
    "half a parameter": (curve(**{"1.5": 1.0}), r"losses\.cc: size '1\.5'"),
    "a size beyond reason": (curve(**{"9" * 5000: 1.0}), r"losses\.cc: size '9{40}'"),
    "no losses": ({"targets": {"1B": "1B"}}, r"losses is required"),
    "no domain": ({"losses": {}}, r"losses has no domain"),
    "losses as a list": ({"losses": [1, 2, 3]}, r"losses must map domains"),
    "a domain as a number": ({"losses": {"cc": 1.5}}, r"losses\.cc must map numbers of parameters"),
    "a name that no data folder has": ({"losses": {"../cc": LOSSES["cc"]}}, r"losses: name '\.\./cc' must be letters"),
    "an unknown key": ({"losses": LOSSES, "target": {}}, r"unknown key 'target'; did you mean 'targets'\?"),
    "a strange key": ({"losses": LOSSES, "zzz": {}}, r"unknown key 'zzz'; known here: losses, targets"),
    "a target that is none": ({"losses": LOSSES, "targets": {"tiny": "tiny"}}, r"targets\.tiny: size 'tiny'"),
    "targets as a list": ({"losses": LOSSES, "targets": ["1B"]}, r"targets must map names"),
    "a target without a name": ({"losses": LOSSES, "targets": {"": "1B"}}, r"targets: name ''"),
    "a negative error": ({"losses": LOSSES, "standard_error": -0.1}, r"standard_error '-0\.1' is not a number of nats"),
    "an error that is none": ({"losses": LOSSES, "standard_error": "small"}, r"standard_error 'small'"),
    "an error a domain": ({"losses": LOSSES, "standard_error": {"cc": 1}}, r"standard_error a mapping"),
    "a list": ([1, 2], r"must map the key 'losses'"),
    "no JSON": ("{", "not valid JSON"),
    "deep JSON": ('{"a":' * 50_000, "not valid JSON"),
    "too large": (" " * (2**20 + 1), "more than 1048576 bytes"),
}


@pytest.mark.parametrize(("content", "match"), BROKEN.values(), ids=BROKEN)
def test_a_broken_table_is_refused_with_file_and_key(tmp_path, content, match):
    path = written(tmp_path, content)
    with pytest.raises(DataError, match=rf"table\.json.*{match}" if "bytes" not in match else match) as raised:
        load_table(path)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 400


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("losses: [", "not valid YAML"),
        ("losses: &x {cc: 1}\ntargets: *x", "aliases are not supported"),
        ("losses: {cc: {? [1, 2] : 3}}", r"losses\.cc: size '\[\.\.\.\]'"),
        ("losses: {cc: {1B: 2, 2B: 1.9, 1B: 1.8}}", r"losses\.cc: key '1B' stands twice"),
        ("losses: {cc: {1B: 2, 1_000_000_000: 1.9, 3B: 1.8}}", r"losses\.cc: size '1_000_000_000'"),
        ("losses: {cc: {1B: 2, 2B: .inf, 3B: 1.8}}", r"losses\.cc\.2B"),
        ("losses: {cc: {1B: 2, 2B: , 3B: 1.8}}", r"losses\.cc\.2B: '' is not a loss"),
        ("losses: {cc: {1B: 2, 2B: [1.9], 3B: 1.8}}", r"losses\.cc\.2B"),
        ("losses: !!python/name:os.system x", "losses must map"),
        ("", "must map the key 'losses'"),
        ("\x00", "not valid YAML"),
        ("[" * 1500, "not valid YAML"),
    ],
    ids=lambda text: text[:30],
)
def test_broken_yaml_is_refused(tmp_path, content, match):
    with pytest.raises(DataError, match=rf"(?s)t\.yaml.*{match}"):
        load_table(written(tmp_path, content, "t.yaml"))


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("", r"the first column is ''; it must be 'parameters'"),
        ("size,cc\n1B,2\n", r"the first column is 'size'"),
        ("parameters;cc\n1B;2\n", r"first column.*commas between"),
        ("parameters\n1B\n", r"losses has no domain"),
        ("parameters,cc,cc\n1B,2,2\n", r"losses: key 'cc' stands twice"),
        ("parameters,cc\n1B,2\n2B\n", r"line 3 has 1 cells where the header has 2"),
        ("parameters,cc\n1B,2\n2B,1.9,1\n", r"line 3 has 3 cells"),
        ("parameters,cc\n1B,2\n2B,1.9\n3B,\n", r"losses\.cc has 2 sizes"),
        ("parameters,cc\n1B,2\n2B,x\n3B,1\n", r"losses\.cc\.2B: 'x' is not a loss"),
        ("parameters,cc\n1B,2\n2B,1.9\n1000M,1\n", r"losses\.cc: size '1000M'"),
        ("parameters,cc\n1B,2\n1B,1.9\n3B,1\n", r"losses\.cc: key '1B' stands twice"),
        ('parameters,cc\n1B,"2\n', r"line \d is not valid CSV"),
        ("parameters,a b\n1B,2\n2B,1.9\n3B,1.8\n", r"losses: name 'a b'"),
    ],
    ids=repr,
)
def test_broken_csv_is_refused(tmp_path, content, match):
    with pytest.raises(DataError, match=rf"t\.csv.*{match}"):
        load_table(written(tmp_path, content, "t.csv"))


@pytest.mark.parametrize("name", ["t.json", "t.yaml", "t.csv"])
def test_bytes_that_are_no_text_are_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"\xff\xfe\x00parameters")
    with pytest.raises(DataError, match=rf"{name} is not UTF-8 text"):
        load_table(tmp_path / name)


pieces = st.sampled_from(
    ["losses", "parameters", "cc", "1B", "2B", ":", ": ", "{", "}", ",", "\n", '"', "1.5", "- ", "  "]
)


@quick
@given(st.text(max_size=40) | st.lists(pieces, max_size=30).map("".join), st.sampled_from(["json", "yaml", "csv"]))
def test_no_text_at_all_is_a_fault_in_scion(tmp_path_factory, text, ending):
    path = tmp_path_factory.getbasetemp() / f"any.{ending}"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with contextlib.suppress(DataError, UsageError):
        load_table(path)


@pytest.mark.parametrize(("text", "size"), [("6.7B", 6_700_000_000), ("370M", 370_000_000), ("1_000", 1000)])
def test_a_size_is_read_as_people_write_it(text, size):
    assert parse_size(text) == size


def test_sizes_that_hardly_differ_are_no_fault():
    sizes = [10**17, 10**17 + 1, 10**17 + 2]
    with pytest.raises(DataError, match="do not fall"):
        fit(sizes, [2.0, 1.9, 1.8])
    found = fit([10**9, 10**9 + 1, 10**9 + 2], [2.0, 1.9, 1.85])
    assert math.isfinite(found.predict(10**9))
