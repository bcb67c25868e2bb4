"""Best-fit packing: no document cut that fits, no token lost, and how much padding it costs."""

from collections import Counter
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scionlm.core.errors import DataError
from scionlm.data import Batch, Mixture, Order, SamplePlan, TokenStream
from scionlm.data.mixing.packing import Packing, best_fit
from scionlm.data.mixing.windows import IGNORE, PackedWindows, Page, TiledWindows

quick = settings(max_examples=80)
SEPARATOR, BOS, FIRST = 1, 0, 10
lengths = st.lists(st.integers(1, 45) | st.integers(1, 8), min_size=1, max_size=60)
rooms = st.integers(1, 24)


def ends_of(documents: list[int]) -> np.ndarray:
    return np.cumsum(np.array(documents, dtype=np.int64))


def stream_of(documents: list[int], bos: bool = False, shards: int = 1) -> TokenStream:
    """Return a stream of documents, lengths with their separator; every token of text is another one."""
    header = {"tokenizer": {"separator_id": SEPARATOR, "bos_id": BOS if bos else None}}
    made, next_id = [], FIRST
    for part in np.array_split(np.array(documents), min(shards, len(documents))):
        tokens: list[int] = []
        for length in part.tolist():
            text = [BOS] * (bos and length > 1) + list(range(next_id, next_id + length))
            tokens += [*text[: length - 1], SEPARATOR]
            next_id += length
        ends = np.cumsum(part)
        made.append(SimpleNamespace(tokens=np.array(tokens), document_ends=ends, header=header))
    return TokenStream(made)


def everything(windows: PackedWindows | TiledWindows, seq_len: int, positions: bool = False) -> Batch:
    numbers = np.arange(windows.num_windows)
    page = Page(len(numbers), seq_len, windows.shifted, positions)
    page.input_ids[:], page.labels[:] = -7, -7  # whatever is not filled shows
    windows.read(numbers, numbers.tolist(), page)
    return page.batch()


def pieces(packing: Packing) -> list[tuple[int, int]]:
    """Return every piece as [start, end) in the stream."""
    return [(int(s), int(s) + int(n)) for s, n in zip(packing.starts, packing.lengths, strict=True)]


def check(packing: Packing, documents: list[int], room: int) -> None:
    """Check all that a packing promises."""
    ends = ends_of(documents)
    begins = ends - np.array(documents)
    found = sorted(pieces(packing))
    assert found[0][0] == 0
    assert found[-1][1] == ends[-1]
    assert all(first[1] == second[0] for first, second in pairwise(found)), "each token is in one piece"
    for start, end in found:
        document = int(np.searchsorted(ends, start, side="right"))
        assert end <= ends[document], "a piece is of one document"
        if documents[document] <= room:
            assert (start, end) == (begins[document], ends[document]), "what fits is not cut"
        else:
            assert (start - begins[document]) % room == 0, "long documents are cut at multiples of the length only"
            assert end == min(start + room, ends[document])
    for window in range(packing.num_windows):
        held = packing.lengths[packing.offsets[window] : packing.offsets[window + 1]]
        assert 0 < held.sum() <= room


@quick
@given(lengths, rooms)
def test_no_token_is_lost_and_no_document_cut_that_fits(documents, room):
    check(best_fit(ends_of(documents), room), documents, room)


def test_other_packings_are_found_out():
    """The control: a stream cut into equal parts, a document dropped, and one taken twice."""
    documents, room = [5, 9, 3, 30, 12, 1], 12
    right = best_fit(ends_of(documents), room)
    check(right, documents, room)
    total = sum(documents)
    starts = np.arange(0, total, room)
    tiled = Packing(starts, np.minimum(room, total - starts), np.arange(len(starts) + 1), room)
    dropped = Packing(right.starts[1:], right.lengths[1:], np.maximum(right.offsets - 1, 0), room)
    twice = Packing(
        np.append(right.starts, right.starts[:1]),
        np.append(right.lengths, right.lengths[:1]),
        np.append(right.offsets, right.offsets[-1] + 1),
        room,
    )
    crowded = Packing(right.starts, right.lengths, np.array([0, *right.offsets[2:]]), room)
    for wrong in (tiled, dropped, twice, crowded):
        with pytest.raises(AssertionError):
            check(wrong, documents, room)


@quick
@given(lengths, rooms, st.booleans(), st.integers(1, 3))
def test_every_token_is_a_label_once_and_is_read_after_the_one_before_it(documents, room, bos, shards):
    """Before the first token of the stream stands a separator that is not there, so that it too is predicted."""
    stream = stream_of(documents, bos, shards)
    batch = everything(PackedWindows(stream, room), room)
    tokens = stream.read(0, stream.num_tokens).tolist()
    predicted = batch.labels != IGNORE
    pairs = Counter(zip(batch.input_ids[predicted].tolist(), batch.labels[predicted].tolist(), strict=True))
    assert pairs == Counter(zip([SEPARATOR, *tokens[:-1]], tokens, strict=True))
    assert (batch.input_ids[~predicted] == SEPARATOR).all()
    assert batch.input_ids.min() >= 0


@quick
@given(lengths, rooms, st.booleans())
def test_inputs_are_the_labels_shifted_by_one_inside_each_piece(documents, room, bos):
    windows = PackedWindows(stream_of(documents, bos), room)
    batch = everything(windows, room, positions=True)
    restarts = batch.position_ids == 0
    shifted = batch.input_ids[:, 1:] == batch.labels[:, :-1]
    assert (shifted | restarts[:, 1:] | (batch.labels[:, 1:] == IGNORE)).all()
    first_of_text = (batch.labels >= FIRST) & (batch.input_ids == (BOS if bos else SEPARATOR))
    assert (restarts | ~first_of_text).all()  # a document's context opens with its BOS, or with a separator


@quick
@given(lengths, rooms)
def test_positions_count_from_the_separator_before_each_document(documents, room):
    batch = everything(PackedWindows(stream_of(documents), room), room, positions=True)
    for ids, labels, positions in zip(batch.input_ids, batch.labels, batch.position_ids, strict=True):
        for place in range(room):
            after_separator = place == 0 or labels[place - 1] in (SEPARATOR, IGNORE)
            begins = place == 0 or (after_separator and labels[place] != IGNORE)
            if begins:
                assert positions[place] == 0
            elif labels[place] != IGNORE:
                assert positions[place] == positions[place - 1] + 1
        padding = np.flatnonzero(labels == IGNORE)
        assert positions[padding].tolist() == list(range(len(padding)))
        assert (ids[padding] == SEPARATOR).all()


@quick
@given(lengths, rooms, st.integers(0, 4))
def test_padding_is_what_no_label_fills_in_every_epoch(documents, room, epoch):
    plan = SamplePlan({"d": stream_of(documents)}, Mixture({"d": 1.0}), Order(room, packing="best_fit"))
    num_windows = plan.num_windows("d")
    plan.take(epoch * num_windows)
    batch = plan.batch(plan.take(num_windows))
    empty = (batch.labels == IGNORE).sum()
    assert plan.padding()["d"] == pytest.approx(empty / batch.labels.size, abs=1e-12)
    assert empty == num_windows * room - sum(documents)


@quick
@given(lengths, rooms, st.randoms(use_true_random=False))
def test_the_order_of_documents_does_not_matter_to_the_padding(documents, room, random):
    mixed = documents.copy()
    random.shuffle(mixed)
    mine, theirs = best_fit(ends_of(documents), room), best_fit(ends_of(mixed), room)
    assert mine.padding == theirs.padding
    assert Counter(mine.lengths.tolist()) == Counter(theirs.lengths.tolist())


def next_fit(documents: list[int], room: int) -> int:
    """The control: windows filled in the order of the stream."""
    windows, left = 0, 0
    for length in documents:
        if length > left:
            windows, left = windows + 1, room
        left -= length
    return windows


def best_fit_decreasing(documents: list[int], room: int) -> int:
    """Return how many windows the textbook needs: the longest first, each where it leaves the least room, O(N^2)."""
    left: list[int] = []
    for length in sorted((n % room for n in documents if n % room), reverse=True):
        fits = [window for window, free in enumerate(left) if free >= length]
        if fits:
            left[min(fits, key=left.__getitem__)] -= length
        else:
            left.append(room - length)
    return len(left) + sum(length // room for length in documents)


def random_lengths(kind: str, count: int, room: int, rng: np.random.Generator) -> list[int]:
    made = {
        "uniform": lambda: rng.integers(1, room + 1, count),
        "short": lambda: rng.integers(1, room // 3, count),
        "lognormal": lambda: np.maximum(rng.lognormal(np.log(room / 3), 1, count).astype(int), 1),
        "three lengths": lambda: rng.choice(rng.integers(1, room + 1, 3), count),
    }
    return made[kind]().tolist()


@pytest.mark.parametrize("kind", ["uniform", "short", "lognormal"])
def test_about_as_many_windows_as_best_fit_decreasing(kind):
    rng = np.random.default_rng(0)
    for room in (16, 64, 512):
        for count in (20, 200):
            documents = random_lengths(kind, count, room, rng)
            needed = best_fit_decreasing(documents, room)
            assert needed - 1 <= best_fit(ends_of(documents), room).num_windows <= needed + 1


def test_in_the_order_of_the_stream_it_would_take_many_more_windows():
    rng = np.random.default_rng(0)
    documents = random_lengths("uniform", 200, 64, rng)
    assert next_fit(documents, 64) > 1.15 * best_fit(ends_of(documents), 64).num_windows


@quick
@given(lengths, rooms)
def test_exactly_as_many_windows_as_best_fit_decreasing(documents, room):
    assert best_fit(ends_of(documents), room).num_windows == best_fit_decreasing(documents, room)


@pytest.mark.parametrize("scale", [1, 20])
def test_few_lengths_are_packed_as_well_as_many(scale):
    """70 + 29 + 29 is 128: the shorter ones belong into one window as long as they fit, or 19s find no room."""
    documents = ([70] * 10 + [29] * 10 + [19] * 15) * scale
    assert best_fit(ends_of(documents), 128).num_windows == best_fit_decreasing(documents, 128) == 10 * scale


def test_a_million_documents_take_seconds_at_most():
    """Time goes with the number of lengths, not with that of documents."""
    rng = np.random.default_rng(0)
    documents = np.maximum(rng.lognormal(6, 1, 10**6).astype(np.int64), 1)
    packing = best_fit(np.cumsum(documents), 1024)
    assert packing.lengths.sum() == documents.sum()
    assert packing.padding < 0.001


@quick
@given(st.lists(st.integers(1, 30), min_size=2, max_size=30), st.integers(1, 20), st.booleans())
def test_positions_of_tiled_windows_begin_anew_where_a_document_does(documents, room, bos):
    stream = stream_of(documents, bos)
    room = min(room, stream.num_tokens - 1)
    windows = TiledWindows(stream, room)
    batch = everything(windows, room, positions=True)
    tokens = stream.read(0, stream.num_tokens)
    opening = set((ends_of(documents)[:-1] - (not bos)).tolist())
    for window, (ids, positions) in enumerate(zip(batch.input_ids, batch.position_ids, strict=True)):
        start = min(window * room, stream.num_tokens - 1 - room)
        assert ids.tolist() == tokens[start : start + room].tolist()
        for place in range(room):
            anew = place == 0 or start + place in opening
            assert positions[place] == (0 if anew else positions[place - 1] + 1)


def test_a_domain_shorter_than_a_window_can_be_packed_but_not_tiled():
    streams = {"d": stream_of([3])}
    plan = SamplePlan(streams, Mixture({"d": 1.0}), Order(8, packing="best_fit"))
    batch = plan.batch(plan.take(2))
    assert batch.labels[0].tolist() == [FIRST, FIRST + 1, SEPARATOR, *[IGNORE] * 5]
    assert batch.input_ids[1].tolist() == [SEPARATOR, FIRST, FIRST + 1, *[SEPARATOR] * 5]
    with pytest.raises(DataError, match=r"fewer than one window of 9; .*best_fit"):
        SamplePlan(streams, Mixture({"d": 1.0}), Order(8))


def test_a_domain_without_text_is_refused_by_name():
    with pytest.raises(DataError, match="empty"):
        SamplePlan({"empty": TokenStream([])}, Mixture({"empty": 1.0}), Order(8, packing="best_fit"))
