"""Approximate rank and minimal column mass: the paper's numbers, their laws, and float64 without any shortcut."""

import contextlib
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from scionlm.analysis import rank
from scionlm.analysis.rank import TIE, check_thresholds, ranks_and_masses
from scionlm.core.errors import BrokenModelError, UsageError

TAUS = (0.5, 0.8, 0.85, 0.9, 0.95)
BOTH_WAYS = pytest.mark.parametrize("exact", [False, True], ids=["bounds", "exact"])


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# ---- written out: float64, loops -----------------------------------------------------------------


def least(energies, threshold):
    """How many of the energies, the largest first, give the share; and whether one more or less was as good."""
    energies = sorted((float(value) for value in energies), reverse=True)
    total, so_far, tie = sum(energies), 0.0, False
    if total == 0:
        return 0, False
    found = None
    for number, energy in enumerate(energies, start=1):
        so_far += energy
        tie |= threshold < 1 and abs(so_far / total - threshold) <= TIE
        if found is None and so_far / total >= threshold - TIE:
            found = number
    return found, tie


def plain(matrices, thresholds):
    """k* and m* of each matrix, `[M, thresholds]` each, and where there were ties."""
    matrices = np.asarray(matrices, dtype=np.float64)
    both = (np.linalg.svd(matrices, compute_uv=False) ** 2, (matrices**2).sum(-2))
    counts = [np.array([[least(row, t) for t in thresholds] for row in energies]) for energies in both]
    return [count[..., 0] for count in counts], [count[..., 1].astype(bool) for count in counts]


def differences(found, matrices, thresholds):
    """How many integers differ from those of the loops."""
    expected, _ = plain(matrices, thresholds)
    return sum(int((each.values.numpy() != wanted).sum()) for each, wanted in zip(found, expected, strict=True))


# ---- matrices of all kinds -----------------------------------------------------------------------


def causal(logits):
    length = logits.shape[-1]
    return torch.softmax(logits.masked_fill(~torch.ones(length, length).tril().bool(), -torch.inf), -1)


def sinks(noise, temperature, column=0):
    noise = causal(noise * temperature)
    share = torch.linspace(0.0, 1.0, len(noise))[:, None, None]
    sink = torch.zeros_like(noise)
    sink[..., min(column, noise.shape[-1] - 1)] = 1.0
    return share * sink + (1 - share) * noise


def nearly_rank_one(noise):
    rows, columns = torch.rand_like(noise[..., :1]), torch.rand_like(noise[..., :1, :])
    sizes = torch.logspace(-6, 0, len(noise))[:, None, None]
    return rows * columns + sizes * noise.abs()


def banded(noise, width):
    length = noise.shape[-1]
    band = torch.ones(length, length).tril() * torch.ones(length, length).triu(1 - width)
    return torch.softmax(noise.masked_fill(band == 0, -torch.inf), -1)


def low_rank(noise):
    parts = torch.arange(noise.shape[-1]) < 1 + torch.arange(len(noise))[:, None] % 7
    return (noise * parts[:, None, :]) @ torch.rand_like(noise)


def steep(noise, power):
    return noise * (1.0 + torch.arange(noise.shape[-1])) ** -power


def on_purpose(noise):
    """Ties: as many equal directions, or columns, as make some threshold exactly."""
    length = noise.shape[-1]
    made = torch.zeros_like(noise)
    for number, matrix in enumerate(made):
        parts = 1 + number % length
        matrix[range(parts), torch.randperm(length)[:parts]] = 1.0
    return made


KINDS = {
    "flat": lambda noise: causal(0.1 * noise),
    "soft": causal,
    "sharp": lambda noise: causal(4 * noise),
    "hard": lambda noise: causal(30 * noise),
    "first sink": lambda noise: sinks(noise, 2.0),
    "later sink": lambda noise: sinks(noise, 0.5, 3),
    "unmasked": lambda noise: torch.softmax(noise, -1),
    "rank one": nearly_rank_one,
    "banded": lambda noise: banded(noise, 4),
    "identity": lambda noise: torch.eye(noise.shape[-1]) + 0.02 * noise,
    "low rank": low_rank,
    "steep": lambda noise: steep(noise, 1.5),
    "any": lambda noise: noise,
    "ties": on_purpose,
}


def some(kind, length, number=16, seed=0):
    torch.manual_seed(seed)
    return KINDS[kind](torch.randn(number, length, length)).float()


# ---- numbers of the paper ------------------------------------------------------------------------


def one_column(length):
    matrix = torch.zeros(length, length)
    matrix[:, 0] = 1.0
    return matrix


def to_the_one_before(length):
    """Each token looks at the one before it; the first one, which has none, at itself."""
    matrix = torch.diag(torch.ones(length - 1), -1)
    matrix[0, 0] = 1.0
    return matrix


def causal_uniform(length):
    return torch.ones(length, length).tril() / torch.arange(1, length + 1)[:, None]


@BOTH_WAYS
@pytest.mark.parametrize(
    ("matrix", "expected"),
    [
        (torch.eye(100), (90, 90)),  # 89.99999 / 100 in float32
        (one_column(100), (1, 1)),
        (torch.full((100, 100), 0.01), (1, 90)),
        (causal_uniform(100), (5, 30)),
        (causal_uniform(40), (4, 14)),
        (causal_uniform(1024), (7, 221)),
        (to_the_one_before(100), (89, 89)),
        (torch.diag(torch.ones(99), -1), (90, 90)),  # of 99 equal ones, were the first row empty
    ],
    ids=["identity", "one column", "uniform", "causal 100", "causal 40", "causal 1024", "before", "before, empty row"],
)
def test_numbers_of_the_paper(matrix, expected, exact):
    ranks, masses = ranks_and_masses(matrix[None], [0.9], [0.9], exact=exact)
    assert (int(ranks.values), int(masses.values)) == expected
    assert ranks.values.shape == masses.values.shape == ranks.ties.shape == masses.ties.shape == (1, 1)
    assert ranks.values.dtype == torch.int64


def test_a_sink_under_three_quarters_of_noise_still_has_rank_one():
    noise, sink = causal_uniform(100), one_column(100)
    shares = torch.linspace(0.0, 1.0, 101)[:, None, None]
    ranks, masses = ranks_and_masses((1 - shares) * sink + shares * noise, [0.9], [0.9])
    assert shares.flatten()[ranks.values.flatten() == 1].max() == pytest.approx(0.75, abs=0.015)
    assert shares.flatten()[masses.values.flatten() == 1].max() == pytest.approx(0.66, abs=0.015)


def test_the_longer_the_sequence_the_more_noise_leaves_rank_one():
    shares = torch.tensor([0.85, 0.87])[:, None, None]
    ranks, _ = ranks_and_masses((1 - shares) * one_column(1024) + shares * causal_uniform(1024), [0.9], [0.9])
    assert ranks.values.flatten().tolist() == [1, 2]


def test_the_mean_of_matrices_has_not_the_mean_of_their_ranks():
    """Sequences are counted one by one: averaged before, attention looks collapsed that is not."""
    beyond = torch.full((100, 100), -torch.inf).triu(1)
    logits = 4 * torch.randn(100, 100, 100, generator=torch.Generator().manual_seed(0))
    attention = torch.softmax(logits + beyond, dim=-1)
    one_by_one, _ = ranks_and_masses(attention, [0.9], [0.9])
    averaged, _ = ranks_and_masses(attention.mean(0, keepdim=True), [0.9], [0.9])
    assert one_by_one.values.double().mean() == pytest.approx(34.5, abs=1.0)
    assert int(averaged.values) < 12


# ---- the same integers as float64 ----------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 2, 7, 24, 60])
@pytest.mark.parametrize("kind", KINDS)
def test_every_way_gives_the_integers_of_float64(kind, length):
    matrices = some(kind, length)
    found, exactly = (ranks_and_masses(matrices, TAUS, TAUS, exact=exact) for exact in (False, True))
    assert differences(found, matrices, TAUS) == differences(exactly, matrices, TAUS) == 0
    _, ties = plain(matrices, TAUS)
    for each, same, wanted in zip(found, exactly, ties, strict=True):
        assert (each.ties.numpy() == wanted).all()
        assert (same.ties.numpy() == wanted).all()


def test_there_are_a_thousand_of_them():
    assert len(KINDS) * 5 * 16 > 1000


@BOTH_WAYS
def test_ties_are_reported_and_count_as_reached(exact):
    """Ten equal directions: nine are 0.9 of them, whatever rounding makes of it."""
    matrix = torch.zeros(1, 30, 30)
    matrix[0, range(10), range(5, 15)] = 0.1
    ranks, masses = ranks_and_masses(matrix, [0.85, 0.9, 0.95], [0.85, 0.9, 0.95], exact=exact)
    for found in (ranks, masses):
        assert found.values.tolist() == [[9, 9, 10]]
        assert found.ties.tolist() == [[False, True, False]]


@BOTH_WAYS
@pytest.mark.parametrize(("beyond", "expected", "tie"), [(-2e-6, 1, False), (5e-7, 1, True), (2e-6, 2, False)])
def test_what_counts_as_a_tie(exact, beyond, expected, tie):
    """One direction that holds a little less than the threshold, or more."""
    share = 0.9 - beyond
    matrix = torch.tensor([[share, 0.0], [0.0, 1 - share]], dtype=torch.float64).sqrt()[None]
    for found in ranks_and_masses(matrix, [0.9], [0.9], exact=exact):
        assert found.values.tolist() == [[expected]]
        assert found.ties.tolist() == [[tie]]


def test_a_tie_that_only_the_last_count_makes_is_none_at_threshold_one():
    ranks, masses = ranks_and_masses(torch.eye(4)[None], [1.0], [1.0])
    assert ranks.values.item() == masses.values.item() == 4
    assert not ranks.ties.any()
    assert not masses.ties.any()


@pytest.mark.parametrize("kind", ["soft", "first sink", "rank one", "steep", "ties"])
def test_float64_matrices_are_counted_too(kind):
    matrices = some(kind, 20).double()
    matrices += 1e-9 * torch.rand(matrices.shape, dtype=torch.float64)  # that float32 does not see
    assert differences(ranks_and_masses(matrices, TAUS, TAUS), matrices, TAUS) == 0


@BOTH_WAYS
@pytest.mark.parametrize("shape", [(5, 12), (12, 5), (1, 9), (9, 1)])
def test_matrices_need_not_be_square(shape, exact):
    matrices = torch.rand(8, *shape, generator=torch.Generator().manual_seed(3))
    assert differences(ranks_and_masses(matrices, TAUS, TAUS, exact=exact), matrices, TAUS) == 0


# ---- controls: the comparison can fail -----------------------------------------------------------


def test_another_threshold_is_noticed():
    matrices = some("soft", 24)
    found = ranks_and_masses(matrices, [0.9], [0.9])
    assert differences(found, matrices, [0.9]) == 0
    assert differences(found, matrices, [0.92]) > 0


@pytest.mark.parametrize("size", [rank._BLOCK, 24], ids=["bounds", "eigenvalues"])
def test_a_perturbed_eigenvalue_is_noticed(monkeypatch, size):
    matrices = some("soft", 24)
    if size == 24:
        monkeypatch.setattr(rank, "_ritz_bounds", say_nothing)
    asked = []

    def perturbed(gram, own=torch.linalg.eigvalsh):
        values = own(gram)
        if gram.shape[-1] == size:
            asked.append(len(gram))
            values[:, -1] *= 1.1
        return values

    monkeypatch.setattr(torch.linalg, "eigvalsh", perturbed)
    assert differences(ranks_and_masses(matrices, TAUS, TAUS), matrices, TAUS) > 0
    assert asked


def say_nothing(gram):
    none = torch.zeros(len(gram), min(rank._BLOCK, gram.shape[-1]), dtype=torch.float64)
    return none, none + 1.0


@pytest.mark.parametrize("side", ["lower", "upper"])
def test_a_bound_that_is_none_is_noticed(monkeypatch, side):
    """Each as if it were the other: of noise, in which Ritz values are far from eigenvalues, that is wrong."""
    matrices = some("any", 60)
    own = rank._ritz_bounds
    taken = slice(0, 1) if side == "upper" else slice(1, 2)
    monkeypatch.setattr(rank, "_ritz_bounds", lambda gram: own(gram)[taken] * 2)
    taus = (0.2, 0.3, 0.4, 0.5)
    assert differences(ranks_and_masses(matrices, taus, taus), matrices, taus) > 0
    monkeypatch.setattr(rank, "_ritz_bounds", own)
    assert differences(ranks_and_masses(matrices, taus, taus), matrices, taus) == 0


def test_bounds_that_say_nothing_leave_it_to_the_eigenvalues(monkeypatch):
    matrices = some("first sink", 24)
    monkeypatch.setattr(rank, "_ritz_bounds", say_nothing)
    assert differences(ranks_and_masses(matrices, TAUS, TAUS), matrices, TAUS) == 0
    monkeypatch.setattr(rank, "_rounding", lambda gram: 1.0)  # and so to float64
    assert differences(ranks_and_masses(matrices, TAUS, TAUS), matrices, TAUS) == 0


@pytest.mark.parametrize("fails", [torch.float32, torch.float64, None], ids=["float32", "float64", "both"])
def test_eigenvalues_that_do_not_converge_are_found_otherwise(monkeypatch, fails):
    """As LAPACK's do not for some matrices with many equal ones."""
    matrices, refused = some("first sink", 24), []

    def stuck(gram, own=torch.linalg.eigvalsh):
        if fails in (None, gram.dtype):
            refused.append(gram.dtype)
            raise torch.linalg.LinAlgError("failed to converge")
        return own(gram)

    monkeypatch.setattr(torch.linalg, "eigvalsh", stuck)
    assert differences(ranks_and_masses(matrices, TAUS, TAUS), matrices, TAUS) == 0
    monkeypatch.setattr(rank, "_rounding", lambda gram: 1.0)  # all the way to float64
    assert differences(ranks_and_masses(matrices, TAUS, TAUS), matrices, TAUS) == 0
    assert refused


def test_the_cheap_way_is_one(monkeypatch):
    """Most matrices of attention must be settled by bounds, else they are worth nothing."""
    asked = []

    def counted(gram, own=torch.linalg.eigvalsh):
        if gram.shape[-1] == 60:
            asked.append(len(gram))
        return own(gram)

    monkeypatch.setattr(torch.linalg, "eigvalsh", counted)
    matrices = torch.cat([some("first sink", 60, 40), some("flat", 60, 40), some("later sink", 60, 40)])
    ranks_and_masses(matrices, [0.9], [0.9])
    assert sum(asked) < 0.5 * len(matrices)


# ---- bounds --------------------------------------------------------------------------------------


def spectrum(gram, count):
    """Shares of the largest eigenvalues and the eigenvalues over their sum, in float64."""
    values = np.maximum(np.linalg.eigvalsh(gram.double().numpy())[:, ::-1], 0)
    values = values / values.sum(-1, keepdims=True)
    return values.cumsum(-1)[:, :count], values


PSD = st.builds(
    lambda size, seed, power, flat: (size, seed, power, flat),
    st.integers(1, 40),
    st.integers(0, 2**31 - 1),
    st.floats(0.0, 4.0),
    st.integers(0, 20),
)


def positive(size, seed, power, flat):
    """Positive semidefinite matrices `[3, size, size]` with `flat` equal eigenvalues, the others falling."""
    generator = torch.Generator().manual_seed(seed)
    factor = torch.linalg.qr(torch.randn(3, size, size, generator=generator, dtype=torch.float64))[0]
    values = (1.0 + (torch.arange(size) - flat).clamp_min(0)).double() ** -power
    return ((factor * values) @ factor.mT).float()


@settings(max_examples=60)
@given(PSD)
def test_bounds_enclose_the_shares(case):
    gram = positive(*case)
    lower, upper = (bound.numpy() for bound in rank._ritz_bounds(gram))
    shares, values = spectrum(gram, lower.shape[1])
    error = rank._rounding(gram)
    assert (lower <= shares + error).all()
    assert (np.diff(lower, axis=-1) >= -error).all()
    # What float32 costs a difference of squares, divided by 2 t_k as the difference is.
    ritz = np.diff(lower, axis=-1, prepend=0.0).clip(1e-12)
    squares = error * (values**2).sum(-1, keepdims=True) / (2 * ritz)
    assert (shares <= upper + error + squares).all()


@settings(max_examples=80)
@given(PSD, st.integers(1, 8), st.floats(0.0, 1.0))
def test_bounds_hold_whatever_the_subspace(case, block, turn):
    """From that of the largest eigenvalues to any; where Ritz values are far from these, bounds are put to use."""
    gram = positive(*case)
    size = gram.shape[-1]
    block = min(block, size)
    generator = torch.Generator().manual_seed(case[1])
    largest = torch.linalg.eigh(gram)[1].flip(-1)[..., :block]
    turned = (1 - turn) * largest + turn * torch.randn(3, size, block, generator=generator) / size**0.5
    basis = torch.linalg.qr(turned)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rank, "_BLOCK", block)
        patch.setattr(torch.linalg, "qr", lambda matrix: basis)
        lower, upper = (bound.numpy() for bound in rank._ritz_bounds(gram))
    shares, _ = spectrum(gram, block)
    margin = 2 * rank._rounding(gram) + 2 * TIE
    assert lower.shape == (3, block)
    assert (lower <= shares + margin).all()
    assert (shares <= upper + margin).all()


def steep_and_flat(seed):
    """One large singular value, some equal small ones, next to nothing."""
    i = torch.arange(100)
    values = torch.where(i < 1, 1.0, torch.where(i < 33, 10**-1.835, 1e-6)).double()
    generator = torch.Generator().manual_seed(seed)
    left, right = (
        torch.linalg.qr(torch.randn(8, 100, 100, generator=generator, dtype=torch.float64))[0] for _ in range(2)
    )
    return ((left * values) @ right.mT).float()


MAKERS = pytest.mark.parametrize(
    "make",
    [
        steep_and_flat,
        lambda seed: some("flat", 17, 16, seed),
        lambda seed: some("first sink", 256, 8, seed),
        lambda seed: some("later sink", 100, 8, seed),
    ],
    ids=["steep", "flat attention", "first sink", "later sink"],
)


def outside(matrices):
    """Shares that lie above their upper bound by more than `_settle` allows for, and the bounds."""
    gram = matrices.mT @ matrices
    lower, upper = (bound.numpy() for bound in rank._ritz_bounds(gram))
    shares, _ = spectrum(gram, lower.shape[1])
    margin = 2 * rank._rounding(gram) + 2 * TIE
    assert (lower <= shares + margin).all()
    return [(i, shares[i, k], upper[i, k] + margin) for i, k in zip(*np.nonzero(shares > upper + margin), strict=True)]


@MAKERS
def test_bounds_enclose_the_shares_within_the_margin_that_is_allowed_for(make):
    assert not [each for seed in range(12) for each in outside(make(seed))]


@MAKERS
def test_no_threshold_between_a_share_and_its_bound_gives_another_integer(make):
    wrong = 0
    for seed in range(12):
        matrices = make(seed)
        for i, share, bound in outside(matrices):
            tau = (min(share, 1 - 1e-5) + bound) / 2
            wrong += differences(ranks_and_masses(matrices[i : i + 1], [tau], [0.9])[:1], matrices[i : i + 1], [tau])
    assert wrong == 0


# ---- laws ----------------------------------------------------------------------------------------

MATRICES = st.one_of(
    st.builds(
        lambda kind, length, seed: some(kind, length, 1, seed)[0],
        st.sampled_from(sorted(KINDS)),
        st.integers(1, 24),
        st.integers(0, 2**31 - 1),
    ),
    hnp.arrays(np.float32, st.tuples(st.integers(1, 8), st.integers(1, 8)), elements=st.sampled_from(np.arange(9) / 8))
    .map(lambda array: torch.from_numpy(np.ascontiguousarray(array)))
    .filter(lambda matrix: bool((matrix != 0).any())),
)
SHARES = st.floats(0.05, 0.999)
LAW = settings(max_examples=80)


def counts(matrix, *thresholds, exact=False):
    return tuple(
        found.values[0].tolist() for found in ranks_and_masses(matrix[None], thresholds, thresholds, exact=exact)
    )


@LAW
@given(MATRICES, st.sets(SHARES, min_size=2, max_size=4).map(sorted), st.booleans())
def test_counts_lie_between_one_and_all_and_rise_with_the_threshold(matrix, thresholds, exact):
    ranks, masses = counts(matrix, *thresholds, exact=exact)
    assert ranks == sorted(ranks)
    assert masses == sorted(masses)
    assert 1 <= ranks[0] <= ranks[-1] <= min(matrix.shape)
    assert 1 <= masses[0] <= masses[-1] <= matrix.shape[1]
    assert all(k <= m for k, m in zip(ranks, masses, strict=True))  # no columns hold more than as many directions


@LAW
@given(MATRICES, SHARES, st.integers(-12, 12), st.randoms(use_true_random=False))
def test_scale_order_and_side_change_nothing(matrix, threshold, exponent, rng):
    ranks, masses = counts(matrix, threshold)
    rows, columns = (rng.sample(range(size), size) for size in matrix.shape)
    assert counts(matrix * 2.0**exponent, threshold) == (ranks, masses)
    assert counts(matrix * 3.0, threshold) == (ranks, masses)
    assert counts(matrix[rows][:, columns], threshold) == (ranks, masses)
    assert counts(matrix.mT.contiguous(), threshold)[0] == ranks


@LAW
@given(MATRICES)
def test_threshold_one_is_the_numerical_rank(matrix):
    expected = int(np.linalg.matrix_rank(matrix.double().numpy()))
    assert counts(matrix, 1.0)[0] == counts(matrix, 1.0, exact=True)[0] == [expected]


@pytest.mark.parametrize("true_rank", [1, 2, 5, 11, 12])
def test_threshold_one_counts_directions_however_small(true_rank):
    rng = np.random.default_rng(true_rank)
    product = rng.integers(-3, 4, (12, true_rank)).astype(np.float64) @ rng.integers(-3, 4, (true_rank, 12))
    product *= 10.0 ** -np.arange(12)[:, None] / 2
    assert counts(torch.from_numpy(product), 0.9, 1.0)[0][1] == true_rank
    assert counts(torch.from_numpy(product), 0.9)[0][0] < 4


@pytest.mark.parametrize("factor", [1e-20, 1e10, 1e15])
def test_scale_changes_nothing_however_large(factor):
    matrices = some("unmasked", 30, 20, 1)
    taus = (0.9, 0.95, 0.99)
    for found, scaled in zip(
        ranks_and_masses(matrices, taus, taus), ranks_and_masses(matrices * factor, taus, taus), strict=True
    ):
        assert torch.equal(found.values, scaled.values)


@BOTH_WAYS
def test_zeros_have_rank_and_mass_zero(exact):
    matrices = torch.stack([torch.zeros(6, 6), torch.eye(6)])
    for found in ranks_and_masses(matrices, [0.5, 1.0], [0.5, 1.0], exact=exact):
        assert found.values.tolist() == [[0, 0], [3, 6]]
    assert ranks_and_masses(matrices, [0.5], [0.5], exact=exact)[0].values.tolist() == [[0], [3]]
    assert not ranks_and_masses(matrices[:1], [0.5], [0.5], exact=exact)[0].ties.any()


def test_no_matrices_have_no_counts():
    assert all(found.values.shape == (0, 2) for found in ranks_and_masses(torch.zeros(0, 5, 5), [0.5, 0.9], [0.5, 0.9]))


# ---- threads and chunks --------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("elements", [1, 24 * 24 * 5, 2**19])
def test_threads_and_chunks_change_nothing(monkeypatch, threads, elements):
    matrices = torch.cat([some(kind, 24, 5) for kind in KINDS])
    expected = [(found.values.clone(), found.ties) for found in ranks_and_masses(matrices, TAUS, TAUS, exact=True)]
    torch.set_num_threads(threads)
    monkeypatch.setattr(rank, "_CHUNK_ELEMENTS", elements)
    for exact in (False, True):
        for found, (values, ties) in zip(ranks_and_masses(matrices, TAUS, TAUS, exact=exact), expected, strict=True):
            assert torch.equal(found.values, values)
            assert torch.equal(found.ties, ties)
    assert torch.get_num_threads() == threads


@LAW
@given(st.lists(st.integers(1, 5), min_size=1, max_size=5), st.integers(0, 1000))
def test_any_split_of_the_matrices_gives_the_same(sizes, seed):
    kinds = sorted(KINDS)
    matrices = torch.cat([some(kinds[(seed + i) % len(kinds)], 18, size, seed) for i, size in enumerate(sizes)])
    whole = ranks_and_masses(matrices, TAUS, TAUS)
    parts = [ranks_and_masses(part, TAUS, TAUS) for part in matrices.split(sizes)]
    for which, found in enumerate(whole):
        assert torch.equal(found.values, torch.cat([part[which].values for part in parts]))
        assert torch.equal(found.ties, torch.cat([part[which].ties for part in parts]))


def test_nothing_is_differentiated_and_nothing_is_drawn(monkeypatch):
    torch.set_num_threads(2)
    monkeypatch.setattr(rank, "_CHUNK_ELEMENTS", 1)
    matrices = some("soft", 12)
    before, kept = torch.get_rng_state(), matrices.clone()
    ranks_and_masses(matrices, [0.9], [0.9])
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(matrices, kept)


def threads_elsewhere():
    seen = []
    thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return seen[0]


def test_threads_that_start_later_have_as_many_as_before(monkeypatch):
    torch.set_num_threads(2)
    assert threads_elsewhere() == 2
    monkeypatch.setattr(rank, "_CHUNK_ELEMENTS", 1)
    ranks_and_masses(some("soft", 12), [0.9], [0.9])
    assert threads_elsewhere() == 2


# ---- what can go wrong ---------------------------------------------------------------------------


@BOTH_WAYS
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_numbers_that_are_not_finite_are_a_broken_model(monkeypatch, value, exact, threads):
    torch.set_num_threads(threads)
    monkeypatch.setattr(rank, "_CHUNK_ELEMENTS", 144)
    matrices = some("soft", 12)
    matrices[9, 2, 7] = value
    with pytest.raises(BrokenModelError, match="not finite"):
        ranks_and_masses(matrices, [0.9], [0.9], exact=exact)
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("wrong", [[0.0], [-1.0], [1.1], [0.5, 2.0], [float("nan")], []])
def test_thresholds_that_are_no_shares_are_refused(wrong):
    with pytest.raises(UsageError, match=r"^tau"):
        ranks_and_masses(torch.eye(3)[None], wrong, [0.9])
    with pytest.raises(UsageError, match=r"^eta"):
        ranks_and_masses(torch.eye(3)[None], [0.9], wrong)
    with pytest.raises(UsageError, match=r"^share"):
        check_thresholds(wrong, "share")
    check_thresholds([1e-9, 1.0], "share")


@pytest.mark.parametrize("fails", [False, True])
def test_products_are_of_full_precision_and_the_callers_choice_comes_back(fails, monkeypatch):
    seen = []

    def work(*args, **kwargs):
        seen.append(torch.get_float32_matmul_precision())
        if fails:
            raise ValueError("on purpose")
        return certified(*args, **kwargs)

    certified = rank._certified
    monkeypatch.setattr(rank, "_certified", work)
    torch.set_float32_matmul_precision("medium")
    try:
        with pytest.raises(ValueError, match="on purpose") if fails else contextlib.nullcontext():
            ranks_and_masses(torch.eye(4)[None], (0.9,), (0.9,))
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert seen == ["highest"]
