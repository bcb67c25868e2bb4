"""What is said of collapsed attention: order of operations, sinks, theorem H.1, lazy layers, shorter texts."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from handmade import all_matrices, attention_of, causal_softmax, seen, sinks_and_mirrors
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import tokens

from factories import tiny_model
from scionlm.analysis import collapse
from scionlm.analysis.collapse import CollapseSettings, HeadCounts, LayerCollapse
from scionlm.analysis.forward import forward_pass
from scionlm.analysis.rank import ranks_and_masses
from scionlm.analysis.ranking import is_lazy_group, layers_before_lazy_group, lazy_layers, potent_prefix
from scionlm.analysis.summary import Collapse, max_rank
from scionlm.analysis.walk import Walk
from scionlm.core.errors import BrokenModelError, UsageError


def counts_of(matrices, chosen=None, batches=None, groups=None):
    """What one layer's matrices, `[sequences, heads, T, T]`, give."""
    found = LayerCollapse(chosen or CollapseSettings(matrices.shape[-1]), matrices.shape[1], len(matrices))
    for batch in matrices.split(batches or len(matrices)):
        found.see(attention_of(batch, groups))
        found.first += len(batch)
    return found.counts


def collapse_of(matrices, tolerance=0.5):
    """Of matrices `[layers, sequences, heads, T, T]`."""
    chosen = CollapseSettings(matrices.shape[-1])
    return Collapse(HeadCounts.stacked([counts_of(layer, chosen) for layer in matrices]), chosen, tolerance)


def k_star(matrix, tau=0.9):
    energies = np.linalg.svd(np.asarray(matrix, np.float64), compute_uv=False) ** 2
    return 1 + int((energies.cumsum() / energies.sum() < tau - 1e-6).sum())


def m_star(matrix, eta=0.9):
    masses = np.sort((np.asarray(matrix, np.float64) ** 2).sum(0))[::-1]
    return 1 + int((masses.cumsum() / masses.sum() < eta - 1e-6).sum())


# ---- what is averaged, and when ------------------------------------------------------------------


def test_ranks_are_counted_for_each_sequence_and_then_averaged():
    """Permutations have full rank, and their mean, which is uniform, has rank one."""
    length = 20
    shifts = torch.stack([torch.eye(length).roll(shift, 0) for shift in range(length)])[:, None]
    ranks = counts_of(shifts).ranks
    assert (ranks == ranks[..., :1]).all()
    found = collapse_of(shifts[None]).layers()[0]
    assert found["max_rank"] == found["mean_rank"] == found["mean_mass"] == 18
    assert k_star(shifts.mean((0, 1))) == 1
    assert m_star(shifts.mean((0, 1))) == 18


def test_the_order_matters_for_causal_attention_too():
    matrices = causal_softmax(30, 1, 24, 24)
    found = collapse_of(matrices[None]).layers()[0]
    assert found["max_rank"] == pytest.approx(np.mean([k_star(m) for m in matrices[:, 0]]))
    assert found["mean_mass"] == pytest.approx(np.mean([m_star(m) for m in matrices[:, 0]]))
    assert found["max_rank"] > 1.5 * k_star(matrices.mean((0, 1)))


def test_ranks_are_the_largest_of_heads_and_masses_their_mean():
    sharp, flat = causal_softmax(3, 1, 16, 16), causal_softmax(3, 1, 16, 16, sharpness=0.1)
    rising = torch.cat([flat, sharp, flat], dim=1)
    record = collapse_of(torch.stack([rising, flat.expand(-1, 3, -1, -1)]))
    ranks = [[k_star(m) for m in rows] for rows in rising.transpose(0, 1)]
    masses = [[m_star(m) for m in rows] for rows in rising.transpose(0, 1)]
    layer, other = record.layers()
    assert layer["max_rank"] == pytest.approx(np.mean(ranks, axis=1).max())
    assert layer["max_rank_head"] == 1
    assert layer["max_rank_std"] == pytest.approx(np.std(ranks[1]))
    assert layer["mean_rank"] == pytest.approx(np.mean(ranks))
    assert layer["mean_mass"] == pytest.approx(np.mean(masses))
    assert layer["mean_mass_std"] == pytest.approx(np.std(np.mean(masses, axis=0)))
    assert all(layer["max_rank"] >= head["rank"] for head in record.heads() if head["layer"] == 0)
    assert other["max_rank"] < layer["max_rank"]
    assert max_rank(record.ranks()).tolist() == [layer["max_rank"], other["max_rank"]]
    assert [head["rank"] for head in record.heads()[:3]] == pytest.approx(np.mean(ranks, axis=1))
    assert [head["mass"] for head in record.heads()[:3]] == pytest.approx(np.mean(masses, axis=1))


def test_the_largest_head_is_the_same_one_for_every_sequence():
    """Not the largest of each: heads that take turns are none of them large."""
    sink = torch.zeros(2, 2, 10, 10)
    sink[..., 0] = 1.0
    sink[0, 0] = sink[1, 1] = torch.eye(10)
    record = collapse_of(sink[None])
    assert record.ranks().tolist() == [[[9, 1], [1, 9]]]
    assert max_rank(record.ranks()).tolist() == [5.0] == record.sweeps()["lengths"][0]["max_rank"]


def test_a_single_sequence_of_a_single_head_undoes_a_strict_lazy_layer():
    sink = torch.zeros(100, 2, 10, 10)
    sink[..., 0] = 1.0
    sink[7, 1] = torch.eye(10)
    assert max_rank(collapse_of(sink[None]).ranks()) == pytest.approx(1.08)
    assert collapse_of(sink[None], tolerance=0.5).layers()[0]["lazy"]
    assert not collapse_of(sink[None], tolerance=0.05).layers()[0]["lazy"]
    assert collapse_of(sink[None], tolerance=0.05).layers()[0]["rank1_head_ratio"] == 0.5


def test_every_threshold_and_length_has_its_place():
    chosen = CollapseSettings(20, 0.7, 0.6, taus=(0.95, 0.8), etas=(0.9,), lengths=(5, 20, 12))
    assert chosen.all_taus == (0.7, 0.8, 0.95)
    assert chosen.all_etas == (0.6, 0.9)
    assert chosen.all_lengths == (5, 12, 20)
    matrices = causal_softmax(2, 3, 20, 20)
    record = Collapse(HeadCounts.stacked([counts_of(matrices, chosen)] * 2), chosen, 0.5)
    for length in chosen.all_lengths:
        part = matrices[..., :length, :length]
        for tau in chosen.all_taus:
            expected = [[k_star(m, tau) for m in head] for head in part.transpose(0, 1)]
            assert record.ranks(tau, length).tolist() == [expected] * 2
        for eta in chosen.all_etas:
            expected = [[m_star(m, eta) for m in head] for head in part.transpose(0, 1)]
            assert record.masses(eta, length).tolist() == [expected] * 2
    assert (record.ranks() == record.ranks(0.7, 20)).all()
    assert (record.masses() == record.masses(0.6, 20)).all()
    sweeps = record.sweeps()
    assert [each["tau"] for each in sweeps["taus"]] == [0.7, 0.8, 0.95]
    assert [each["max_rank"][0] for each in sweeps["taus"]] == [max_rank(record.ranks(t))[0] for t in chosen.all_taus]
    assert [each["mean_mass"][0] for each in sweeps["etas"]] == [record.masses(e)[0].mean() for e in chosen.all_etas]
    assert [each["seq_len"] for each in sweeps["lengths"]] == [5, 12, 20]
    assert [each["mean_rank"] for each in sweeps["lengths"]] == [
        pytest.approx(record.ranks(seq_len=n).mean()) for n in chosen.all_lengths
    ]


def test_domains_are_parts_of_the_sequences():
    matrices = causal_softmax(4, 2, 10, 10)[None]
    matrices[0, 1] = torch.eye(10)
    record = collapse_of(matrices)
    found = record.domains(["b", "a", "b", "b"])
    assert [each["name"] for each in found] == ["b", "a"]
    assert [each["num_sequences"] for each in found] == [3, 1]
    assert found[1]["max_rank"] == [9.0] == found[1]["mean_mass"]
    assert found[0]["mean_rank"] == pytest.approx(record.ranks()[..., [0, 2, 3]].mean())


def test_ties_are_counted():
    """Ten equal directions: nine of them are 0.9, and eight 0.8; random attention has no such thing."""
    matrices = torch.cat([torch.eye(10).expand(2, 3, 10, 10), causal_softmax(5, 3, 10, 10)])
    chosen = CollapseSettings(10, 0.9, 0.8, taus=(0.85, 0.8), etas=(0.85,), lengths=(5,))
    counts = counts_of(matrices, chosen)
    assert counts.rank_ties.tolist() == [[6, 0, 0], [6, 0, 6]]  # lengths 5 and 10; 0.8 of five are four
    assert counts.mass_ties.tolist() == [[6, 0], [6, 0]]
    overall = Collapse(HeadCounts.stacked([counts, counts]), chosen, 0.5).overall()
    assert (overall["rank_ties"], overall["mass_ties"], overall["num_matrices"]) == (12, 12, 42)


# ---- sinks, entropy, pictures --------------------------------------------------------------------


def by_loops(matrix):
    """(sink, its mass, attention paid to it by those who can, entropy) of one matrix."""
    length = len(matrix)
    masses = [sum(float(matrix[i, j]) ** 2 for i in range(length)) for j in range(length)]
    sink = masses.index(max(masses))
    paid = [float(matrix[i, sink]) for i in range(sink, length)]
    entropies = [-sum(float(p) * math.log(float(p)) for p in row if p > 0) for row in matrix]
    return sink, masses[sink] / sum(masses), sum(paid) / len(paid), sum(entropies) / length


@pytest.mark.parametrize("batches", [1, 2, 5])
def test_sinks_and_entropy_are_those_of_loops(batches):
    matrices = causal_softmax(5, 3, 9, 9)
    matrices[2, 1] = torch.eye(9)
    matrices[3, 0] = 0.0
    matrices[3, 0, :, 4] = 0.75
    matrices[3, 0, :, 2] = 0.25
    counts = counts_of(matrices, batches=batches)
    for sequence in range(5):
        for head in range(3):
            sink, mass, paid, entropy = by_loops(matrices[sequence, head])
            at = (head, sequence)
            if (sequence, head) != (2, 1):  # where all are largest
                assert counts.sink[at] == sink
            assert counts.sink_mass[at] == pytest.approx(mass, rel=1e-5)
            if (sequence, head) not in ((2, 1), (3, 0)):
                assert counts.sink_attention[at] == pytest.approx(paid, rel=1e-5)
            assert counts.entropy[at] == pytest.approx(entropy, rel=1e-5, abs=1e-6)
    assert len(np.unique(counts.sink)) > 1
    assert counts.sink_mass[1, 2] == pytest.approx(1 / 9)
    assert counts.sink_attention[1, 2] == pytest.approx(1 / (9 - counts.sink[1, 2]))
    np.testing.assert_allclose(counts.maps, matrices.mean(0), rtol=1e-5, atol=1e-7)


def test_sinks_are_summed_up():
    matrices = causal_softmax(5, 3, 9, 9)
    record = collapse_of(matrices[None])
    counts, layer, heads = record.counts, record.layers()[0], record.heads()
    found = np.array([[by_loops(m) for m in head] for head in matrices.transpose(0, 1)])  # [heads, sequences, 4]
    assert layer["sink_at_first_token"] == pytest.approx((found[..., 0] == 0).mean())
    for number, name in enumerate(("sink_mass", "sink_attention", "entropy"), start=1):
        assert layer[name] == pytest.approx(found[..., number].mean(), rel=1e-5)
        assert [head[name] for head in heads] == pytest.approx(found[..., number].mean(1), rel=1e-5)
    for head, own in zip(heads, found[..., 0], strict=True):
        values, often = np.unique(own, return_counts=True)
        assert head["sink_position"] in values[often == often.max()]
    assert record.overall()["sink_mass"] == pytest.approx(counts.sink_mass.mean())


def test_pictures_are_of_the_first_forty_tokens():
    matrices = causal_softmax(3, 2, 50, 50)
    counts = counts_of(matrices)
    assert counts.maps.shape == (2, 40, 40)
    np.testing.assert_allclose(counts.maps, matrices[..., :40, :40].mean(0), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("batches", "groups"), [(1, 6), (2, 3), (5, 1), (3, 2)])
@pytest.mark.parametrize("elements", [1, 8 * 8 * 4, 8 * 8 * 6, 8 * 8 * 13, 2**24])
def test_what_fits_into_memory_changes_nothing(monkeypatch, elements, batches, groups):
    matrices = causal_softmax(5, 6, 8, 8)
    matrices[0], matrices[3, 2] = torch.eye(8), torch.eye(8)  # in which there are ties
    chosen = CollapseSettings(8, 0.75, 0.75, lengths=(4,))
    whole = counts_of(matrices, chosen)
    assert whole.rank_ties.sum() == whole.mass_ties.sum() == 2 * 7
    sizes = []
    own = collapse.ranks_and_masses
    monkeypatch.setattr(collapse, "_ELEMENTS", elements)
    monkeypatch.setattr(collapse, "ranks_and_masses", lambda m, *a, **k: (sizes.append(m.numel()), own(m, *a, **k))[1])
    parts = counts_of(matrices, chosen, batches, groups)
    assert max(sizes) <= max(elements, 64)
    for name in HeadCounts.names():
        one, other = getattr(whole, name), getattr(parts, name)
        if one.dtype.kind == "i":
            assert (one == other).all()
        else:
            np.testing.assert_allclose(other, one, rtol=1e-5, atol=1e-7)


def test_pieces_are_every_head_of_every_sequence_once(monkeypatch):
    attention = attention_of(causal_softmax(3, 5, 4, 4))
    for elements in (1, 16 * 2, 16 * 5, 16 * 11, 10**6):
        monkeypatch.setattr(collapse, "_ELEMENTS", elements)
        times = np.zeros((3, 5))
        for rows, heads, matrices in collapse._pieces(attention):
            times[rows, heads] += 1
            assert torch.equal(matrices, all_matrices(attention)[rows, heads])
        assert (times == 1).all()


# ---- shorter texts -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_type", "changes"), [("llama", {}), ("mistral", {"sliding_window": 8}), ("gemma2", {}), ("gpt2", {})]
)
def test_the_first_part_of_a_text_is_that_text_alone(model_type, changes):
    model, ids = tiny_model(model_type, **changes), tokens(3, 3, 20)
    chosen = CollapseSettings(20, lengths=(2, 5, 13))
    with Walk(model) as walk:
        whole = Collapse(forward_pass(walk, ids, chosen, 0).heads, chosen, 0.5)
        for length in (2, 5, 13, 20):
            short = CollapseSettings(length)
            alone = Collapse(forward_pass(walk, ids[:, :length], short, 0).heads, short, 0.5)
            for tau in chosen.all_taus:
                assert (whole.ranks(tau, length) == alone.ranks(tau)).all()
            for eta in chosen.all_etas:
                assert (whole.masses(eta, length) == alone.masses(eta)).all()
    assert whole.ranks().max() > whole.ranks(seq_len=5).max()


# ---- theorem H.1 ---------------------------------------------------------------------------------

SINKS = given(st.floats(1e-3, 0.5), st.integers(2, 24), st.integers(0, 2**31 - 1))


def sink_of(epsilon, length, seed):
    """Rows that put 1 - epsilon or more on one column, and that column."""
    rng = np.random.default_rng(seed)
    column = int(rng.integers(length))
    rest = rng.dirichlet(np.full(length - 1, rng.choice([0.05, 1.0])), length) * epsilon * rng.random((length, 1))
    rest[0] *= epsilon / rest[0].sum()  # one as far as it may
    return np.insert(rest, column, 1 - rest.sum(1), axis=1), column


@settings(max_examples=60)
@SINKS
def test_a_sink_is_close_to_rank_one_and_counted_so(epsilon, length, seed):
    matrix, column = sink_of(epsilon, length, seed)
    one_column = np.zeros_like(matrix)
    one_column[:, column] = 1.0
    bound = epsilon * math.sqrt(2 * length)
    assert np.linalg.norm(matrix - one_column) <= bound * (1 + 1e-12)
    assert np.linalg.svd(matrix, compute_uv=False)[1] <= bound * (1 + 1e-12)
    counts = counts_of(torch.from_numpy(matrix).float()[None, None])
    share = (1 - epsilon) ** 2 / ((1 - epsilon) ** 2 + epsilon**2)
    if epsilon < 0.5:
        assert counts.sink.item() == column
    assert counts.sink_mass.item() >= share - 1e-5
    if share > 0.9:
        assert counts.masses[0, CollapseSettings(2).all_etas.index(0.9)].item() == 1
    if 1 - 2 * epsilon**2 / (1 - epsilon) ** 2 > 0.9:
        assert counts.ranks[0, CollapseSettings(2).all_taus.index(0.9)].item() == 1


@settings(max_examples=60)
@SINKS
def test_softmax_passes_little_on_of_a_sink(epsilon, length, seed):
    matrix, _ = sink_of(epsilon, length, seed)
    for row in matrix:
        assert np.linalg.norm(np.diag(row) - np.outer(row, row), 2) <= 2 * epsilon * (1 + 1e-12)


def test_queries_and_keys_of_a_sink_learn_little():
    """The bounds on the gradients of their weights, by autograd, in attention written out."""
    ratios = []
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        length, width, dim = 10, 12, 4

        def draw(*shape, g=generator):
            return torch.randn(*shape, generator=g, dtype=torch.float64)

        x, w_q, w_k, w_v = draw(length, width), draw(width, dim), draw(width, dim), draw(width, dim)
        pull = torch.zeros(length, length, dtype=torch.float64)
        pull[:, 3] = 8.0 + 8.0 * seed / 5
        for weight in (w_q, w_k):
            weight.mul_(0.3).requires_grad_()
        scores = (x @ w_q) @ (x @ w_k).T / math.sqrt(dim) + pull
        attention = torch.softmax(scores, -1)
        attention.retain_grad()
        (draw(length, dim) * (attention @ (x @ w_v))).sum().backward()
        epsilon = float(1 - attention.detach()[:, 3].min())
        assert epsilon < 0.5
        spectral, frobenius = torch.linalg.matrix_norm, torch.linalg.vector_norm
        common = 2 * epsilon / math.sqrt(dim) * spectral(x, 2) * frobenius(attention.grad)
        for weight, other in ((w_q, x @ w_k.detach()), (w_k, x @ w_q.detach())):
            bound = float(common * spectral(other, 2))
            assert frobenius(weight.grad) <= bound
            ratios.append(float(frobenius(weight.grad)) / bound)
        found = counts_of(attention.detach().float()[None, None])
        assert found.sink.item() == 3
    assert max(ratios) > 1e-3  # the bound is one that could be missed


# ---- lazy layers ---------------------------------------------------------------------------------

SINK, MIRROR = ("sink",) * 4, ("mirror",) * 4
MIXED = ("sink", "sink", "mirror", "sink")


def analysed(*layers, tolerance=0.5):
    chosen = CollapseSettings(12)
    with Walk(sinks_and_mirrors(layers)) as walk:
        return Collapse(forward_pass(walk, tokens(0, 2, 12), chosen, 0).heads, chosen, tolerance)


def test_a_model_set_by_hand_has_the_attention_that_it_should():
    model = sinks_and_mirrors([MIXED])
    matrices = all_matrices(seen(model, tokens(0, 2, 12))[0])
    column = torch.zeros(12, 12)
    column[:, 0] = 1.0
    for head, kind in enumerate(MIXED):
        torch.testing.assert_close(
            matrices[0, head], column if kind == "sink" else torch.eye(12), atol=1e-4, rtol=0, check_stride=False
        )


def test_layers_are_lazy_if_every_head_is():
    record = analysed(MIRROR, SINK, MIXED, SINK)
    layers = record.layers()
    assert [layer["max_rank"] for layer in layers] == [11, 1, 11, 1]
    assert [layer["lazy"] for layer in layers] == [False, True, False, True]
    assert record.overall()["lazy_layers"] == lazy_layers(max_rank(record.ranks()), 0.5) == [1, 3]
    assert [layer["rank1_head_ratio"] for layer in layers] == [0.0, 1.0, 0.75, 1.0]
    assert layers[2]["max_rank_head"] == 2
    assert [layer["mean_mass"] for layer in layers] == [11, 1, (11 + 3) / 4, 1]
    assert layers[1]["sink_at_first_token"] == 1
    assert layers[1]["sink_mass"] == pytest.approx(1.0)
    assert record.overall()["rank1_head_ratio"] == pytest.approx(11 / 16)
    assert not lazy_layers(max_rank(record.ranks()), 0.0)  # nothing is below 1


def test_halves_of_a_model_are_groups():
    first, second = analysed(MIRROR, MIXED, SINK, SINK, SINK).groups()
    assert (first["first"], first["last"], second["first"], second["last"]) == (0, 1, 2, 4)
    assert (first["avg_rank"], second["avg_rank"]) == (11, 1)
    assert (first["lazy"], second["lazy"]) == (False, True)
    assert second["avg_mass"] == 1
    assert analysed(SINK).groups() == []


@pytest.mark.parametrize(
    ("ranks", "lazy"),
    [
        ([1.0], True),
        ([1.0, 2.9], True),
        ([1.0, 3.0], False),
        ([1.99], True),
        ([2.0], False),
        ([0.5], False),
        ([], False),
    ],
)
def test_a_group_is_lazy_if_the_floor_of_its_mean_is_one(ranks, lazy):
    assert is_lazy_group(np.array(ranks)) == lazy


def test_a_group_of_average_rank_two_is_not_lazy():
    ranks = np.array([9, 4, 5, 3, 4, 3, 5, 8, 9, 10]) / 3
    assert 3 * ranks.sum() == pytest.approx(60)
    assert not is_lazy_group(ranks)


@pytest.mark.parametrize(
    ("ranks", "depth", "prefix"),
    [
        ([30.0, 8.0, 1.0, 1.0], 2, 2),
        ([30.0, 8.0, 1.0], 3, 2),  # one layer is no group
        ([30.0, 8.0, 1.8], 3, 3),
        ([30.0, 1.0, 8.0, 1.0, 1.2], 4 - 1, 1),  # 8, 1, 1.2 are 3.4 on average
        ([30.0, 1.0, 2.5, 1.0, 1.2], 1, 1),
        ([30.0, 8.0, 2.0], 3, 3),
        ([30.0, 1.0, 2.0], 1, 1),
        ([1.0, 9.0, 9.0], 3, 0),
        ([5.0], 1, 1),
        ([9.0, 2.6, 1.2, 1.2], 1, 2),
    ],
)
def test_layers_before_the_lazy_ones(ranks, depth, prefix):
    ranks = np.array(ranks)
    assert layers_before_lazy_group(ranks) == depth
    assert potent_prefix(ranks, 0.5) == prefix
    if depth < len(ranks):
        assert is_lazy_group(ranks[depth:])
        assert not any(is_lazy_group(ranks[first:]) for first in range(1, min(depth, len(ranks) - 1)))


def test_ranks_of_a_model_say_how_many_layers_are_potent():
    ranks = max_rank(analysed(MIRROR, MIXED, MIRROR, SINK, SINK).ranks())
    assert layers_before_lazy_group(ranks) == potent_prefix(ranks, 0.5) == 3
    ranks = max_rank(analysed(MIRROR, SINK, MIRROR, SINK).ranks())
    assert layers_before_lazy_group(ranks) == 4  # the last layer alone is no group
    assert potent_prefix(ranks, 0.5) == 1


# ---- what can go wrong ---------------------------------------------------------------------------


def test_settings_that_cannot_be_are_refused():
    for wrong in ({"tau": 0.0}, {"eta": 1.5}, {"taus": (0.9, -1.0)}, {"etas": (2.0,)}):
        with pytest.raises(UsageError, match=next(iter(wrong))[:3]):
            CollapseSettings(10, **wrong)
    for length in (1, 0, 11):
        with pytest.raises(UsageError, match=f"lengths: {length} "):
            CollapseSettings(10, lengths=(5, length))


def test_further_thresholds_may_be_none():
    chosen = CollapseSettings(10, taus=(), etas=())
    assert counts_of(causal_softmax(2, 2, 10, 10), chosen).ranks.shape == (1, 1, 2, 2)


def test_attention_that_is_not_finite_is_a_broken_model():
    attention = attention_of(causal_softmax(1, 2, 6, 6))
    query, output = attention.query.clone(), attention.output.clone()
    query[0, 1, 3] = torch.nan
    output[0, 3, 1] = torch.nan
    with pytest.raises(BrokenModelError):
        LayerCollapse(CollapseSettings(6), 2, 1).see(replace(attention, query=query, output=output))


def test_exact_counts_are_the_same():
    matrices = causal_softmax(3, 4, 30, 30)
    fast, exact = (counts_of(matrices, CollapseSettings(30, lengths=(7,), exact=each)) for each in (False, True))
    assert (fast.ranks == exact.ranks).all()
    assert (fast.masses == exact.masses).all()
    ranks, _ = ranks_and_masses(matrices.flatten(0, 1), [0.9], [0.9], exact=True)
    at = CollapseSettings(2).all_taus.index(0.9)
    assert (exact.ranks[1, at].T.ravel() == ranks.values[:, 0].numpy()).all()
