"""How an analysis was made, and what its words mean."""

from collections.abc import Mapping
from typing import Any

from scionlm.report.analysis_read import Look, finite, of
from scionlm.report.html import Content, Markup, clip, facts, join, name_of, section, tag
from scionlm.report.values import integer, mapping, text
from scionlm.report.wording import count, duration, exact

_PARTS = {
    "forward": "attention and layers",
    "gradients": "gradients",
    "removal": "loss without each layer",
    "lens": "loss after each layer",
    "greedy": "greedy removal",
}

_WORDS = (
    (
        "k*, rank of a head",
        "The least number of singular directions of an attention matrix that hold the share tau of its energy, the sum "
        "of squared singular values. Taken for each sequence, then averaged. It is at least 1 and grows with the "
        "length. A causal head that looks evenly at all earlier tokens has 5 at 100 tokens; one that copies the token "
        "before has 89.",
    ),
    (
        "MaxRank, lazy layer, lazy group",
        "MaxRank of a layer is the mean k* of the head where it is largest. A layer is lazy if MaxRank is below 1 plus "
        "the tolerance; a group of layers is lazy if the mean of MaxRank over it, AvgRank, lies from 1 to below 2. A "
        "rank of 1 leaves room: a head can pay much attention elsewhere and still have it.",
    ),
    (
        "m*, column mass",
        "The least number of columns (tokens that are looked at) that hold the share eta of the squared attention. The "
        "mean mass of a layer is the mean over its heads.",
    ),
    (
        "Sink",
        "The column with the largest mass. Most often it is the first token, which says little by itself: a head with "
        "nothing to add parks its attention there.",
    ),
    (
        "Removal and Taylor",
        "Removal: the loss without a layer, less the loss with it. Taylor: the same to first order, from the gradient "
        "of the loss.",
    ),
    (
        "Block influence, angular distance, update norm",
        "Block influence: 1 less the cosine of what goes into a layer and what comes out. Angular distance: the angle "
        "between the two for the last token, over \u03c0. Update norm: the size of what it adds over that of what it "
        "reads.",
    ),
    (
        "CKA",
        "How alike the hidden states of many tokens are behind two layers, whatever the rotation and scale; 1 is the "
        "same.",
    ),
    (
        "Lens",
        "The loss if final norm and head read what comes out of a layer. The lens gain of a layer is by how much it "
        "lowers that loss.",
    ),
)


def method_section(look: Look) -> Markup:
    """Return how it was measured, and the words in a line or two each."""
    columns = [
        tag("div", tag("h3", title), facts(pairs))
        for title, pairs in (("What was read", _read(look)), ("How", _how(look)), ("How long it took", _took(look)))
        if pairs
    ]
    entries = [tag("div", tag("h3", term), tag("p", meaning, class_="note")) for term, meaning in _WORDS]
    source = (
        "Ranks and masses: Sanyal et al., When Attention Collapses (Inheritune), arXiv:2404.08634. Block influence: "
        "Men et al., arXiv:2403.03853. Angular distance: Gromov et al., arXiv:2403.17887. CKA: Kornblith et al., "
        "arXiv:1905.00414."
    )
    return join(
        section("method", "How it was measured", tag("div", columns, class_="columns")),
        section(
            "words", "What the words mean", tag("div", entries, class_="columns card"), tag("p", source, class_="note")
        ),
    )


def _read(look: Look) -> list[tuple[Content, Content]]:
    model, data = look.model, mapping(look.record.get("data"))
    path, revision, license_ = text(data, "path"), text(model, "revision"), text(model, "license")
    split, print_ = text(data, "split"), text(data, "fingerprint")
    weights = text(model, "weights_sha256")
    return [
        ("model", name_of(look.name)),
        ("revision", name_of(revision, 40) if revision else None),
        ("kind", name_of(kind, 40) if (kind := text(model, "model_type")) else None),
        ("parameters", count(number) if (number := integer(model, "num_parameters")) is not None else None),
        ("weights", tag("code", clip(weights, 12)) if weights else None),
        ("license", name_of(license_, 40) if license_ else None),
        ("data", name_of(path) if path else "token ids that were passed in"),
        ("split", clip(split, 40) if split else None),
        ("data fingerprint", tag("code", clip(print_, 12)) if print_ else None),
    ]


def _how(look: Look) -> list[tuple[Content, Content]]:
    record, overall = look.record, look.overall
    device = mapping(record.get("device"))
    sequences, few = integer(record, "num_sequences"), integer(record, "loss_sequences")
    on = f"{few:,}, the first of them" if few is not None else None
    return [
        ("tokens of a sequence", _exact(record, "seq_len")),
        ("sequences", f"{sequences:,}" if sequences is not None else None),
        ("for losses and gradients", on),
        ("seed of the sample", _exact(record, "seed")),
        ("tau, for ranks", _plain(record, "tau")),
        ("eta, for masses", _plain(record, "eta")),
        ("lazy below a MaxRank of 1 +", _plain(record, "lazy_tolerance")),
        ("ranks at a tie with tau", _ties(overall, "rank_ties")),
        ("masses at a tie with eta", _ties(overall, "mass_ties")),
        ("singular values", "all, in float64" if record.get("exact") is True else "as many as the ranks need"),
        ("precision", name_of(precision, 20) if (precision := text(record, "precision")) else None),
        ("device", name_of(name, 60) if (name := text(device, "name")) else None),
    ]


def _exact(record: Mapping[str, Any], key: str) -> str | None:
    value = integer(record, key)
    return None if value is None else exact(value)


def _plain(record: Mapping[str, Any], key: str) -> str | None:
    value = finite(record, key)
    return None if value is None else f"{value:g}"


def _ties(overall: Mapping[str, Any], key: str) -> str | None:
    ties, total = integer(overall, key), integer(overall, "num_matrices")
    if ties is None:
        return None
    return f"{ties:,} of {of(total, 'matrix').replace('matrixs', 'matrices')}" if total else f"{ties:,}"


def _took(look: Look) -> list[tuple[Content, Content]]:
    seconds = mapping(look.record.get("seconds"))
    parts = [(name, duration(finite(seconds, name))) for name in list(seconds)[:20]]
    return [(_PARTS.get(name.partition("-")[0], name_of(name, 40)), took) for name, took in parts if took is not None]
