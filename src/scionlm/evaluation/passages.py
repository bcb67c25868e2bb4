"""Items of the offline suite: questions that one's own held-out text asks, the same ones for the same data and seed.

Everything is text that no training saw: the split is by document. An item's place is chosen by dice that know the
seed, the task and the domain alone.
"""

import hashlib
import json
import random
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field

from tokenizers import Tokenizer

from scionlm.core.errors import DataError
from scionlm.data import DataFolder

LAST_WORD, CLOZE, NEXT_LINE = "offline_last_word", "offline_cloze", "offline_next_line"

_DOCUMENTS = 400  # of a domain's held-out part, spread evenly over it
_TOKENS = 2048  # of each, from its start
_FEWEST = 10  # items of a domain, else it is left out of a task
_CHOICES = 4
_CONTEXT_WORDS, _CHOICE_WORDS = 40, 10
_CONTEXT_LINES, _CONTEXT_CHARS = 12, 600
_CANDIDATES = 24  # distractors to take the ones nearest in length from
CODE_INDENTED, CODE_ENDED = 0.3, 0.2
"""Shares of a domain's lines that are indented, and that end as statements do, from which on it counts as code."""
_ENDS = tuple(":;{}()")


@dataclass(frozen=True)
class Item:
    """A context, and what may follow it.

    Attributes:
        domain: Where it is from.
        context: Text.
        choices: What may follow, directly; one alone is to be found among all words.
        answer: Which of them does follow.
    """

    domain: str
    context: str
    choices: tuple[str, ...]
    answer: int = 0


@dataclass
class Passages:
    """All items of a data folder.

    Attributes:
        tasks: Items by task; a task that no domain has enough of is not there.
        seed: Of the dice that chose them.
        lines: By domain the share of lines that are indented, and that end as statements do.
    """

    seed: int
    tasks: dict[str, list[Item]] = field(default_factory=dict)
    lines: dict[str, dict[str, float]] = field(default_factory=dict)


def make_passages(
    places: Mapping[str, tuple[DataFolder, str]], tokenizer: Tokenizer, num_items: int, seed: int
) -> Passages:
    """Return the items that the held-out part of some domains gives.

    `offline_last_word`: the last word of a sentence that occurs in the forty words before it, too (as in LAMBADA).
    `offline_cloze`: the ten words that follow forty, among as many words of other documents of the domain.
    `offline_next_line`: the line after twelve, among other lines of the document or the domain with its indent. Only of
    code: domains where `CODE_INDENTED` of the lines are indented and `CODE_ENDED` end with one of `:;{}()`.

    Args:
        places: Data folder and domain, by the name that items bear; their order does not matter.
        tokenizer: Of the data.
        num_items: At most so many of each task, shared evenly by the domains that have some.
        seed: Of the dice.

    Source: LAMBADA, Paperno et al., arXiv:1606.06031, for the first.
    """
    texts = {name: list(_documents(data, domain, tokenizer)) for name, (data, domain) in sorted(places.items())}
    domains = list(texts)
    found = Passages(seed, lines={domain: _lines_of(some) for domain, some in texts.items()})
    code = [
        name for name, line in found.lines.items() if line["indented"] >= CODE_INDENTED and line["ended"] >= CODE_ENDED
    ]
    makers: list[tuple[str, list[str], Callable[[list[str], random.Random], Iterator[Item]]]] = [
        (LAST_WORD, domains, _last_words),
        (CLOZE, domains, _clozes),
        (NEXT_LINE, code, _next_lines),
    ]
    for task, names, make in makers:
        drawn: dict[str, list[Item]] = {}
        for domain in names:
            dice = random.Random(f"{seed}/{task}/{domain}")  # noqa: S311 - no secret
            items = [_of(domain, item) for item, _ in zip(make(texts[domain], dice), range(num_items), strict=False)]
            if len(items) >= min(_FEWEST, num_items):
                drawn[domain] = items
        shares = _dealt({domain: len(some) for domain, some in drawn.items()}, num_items)
        items = [item for domain, some in drawn.items() for item in some[: shares[domain]]]
        if items:
            found.tasks[task] = items
    return found


def require_items(passages: Passages) -> None:
    """Look whether there are any.

    Raises:
        DataError: There are none.
    """
    if not passages.tasks:
        raise DataError("the held-out part of the data is too short for tasks; hold more out (held_out.fraction)")


def _dealt(have: Mapping[str, int], wanted: int) -> dict[str, int]:
    """Return how many items each domain gives: evenly, and what one of them lacks from the others."""
    shares = dict.fromkeys(have, 0)
    while (left := wanted - sum(shares.values())) > 0:
        open_to_more = [name for name in have if shares[name] < have[name]]
        if not open_to_more:
            break
        for name in open_to_more[:left]:
            shares[name] += 1
    return shares


def items_hash(items: list[Item]) -> str:
    """Return a hash of items: two models are only compared where it is the same."""
    return hashlib.sha256(json.dumps([asdict(item) for item in items]).encode()).hexdigest()


def _of(domain: str, item: Item) -> Item:
    return Item(domain, item.context, item.choices, item.answer)


def _documents(data: DataFolder, domain: str, tokenizer: Tokenizer) -> Iterator[str]:
    """Yield the beginning of held-out documents, one cut short without its last word."""
    stream = data.stream(domain, "held_out")
    step = max(1, stream.num_documents // _DOCUMENTS)
    for number, document in enumerate(stream.documents()):
        if number % step or number >= step * _DOCUMENTS:
            continue
        length = min(document.end - document.start, _TOKENS)
        text = tokenizer.decode(stream.read(document.start, length).tolist()).replace("\r\n", "\n")
        yield text if length < _TOKENS else re.sub(r"\s*\S*$", "", text)


def _lines_of(texts: list[str]) -> dict[str, float]:
    lines = [line.rstrip() for text in texts for line in text.split("\n") if line.strip()]
    counts = {
        "indented": sum(line.startswith(("  ", "\t")) for line in lines),
        "ended": sum(line.endswith(_ENDS) for line in lines),
    }
    return {name: count / max(len(lines), 1) for name, count in counts.items()}


def _in_turns(found: list[list[Item]], dice: random.Random) -> Iterator[Item]:
    """Yield items so that each document has given one before another gives its second."""
    for some in found:
        dice.shuffle(some)
    dice.shuffle(found)
    for turn in range(max(map(len, found), default=0)):
        yield from (some[turn] for some in found if turn < len(some))


def _last_words(texts: list[str], dice: random.Random) -> Iterator[Item]:
    found: list[list[Item]] = []
    for text in texts:
        some: list[Item] = []
        words = list(re.finditer(r"\S+", text))
        free = 0  # passages do not overlap
        for number in range(_CONTEXT_WORDS // 2, len(words)):
            start = max(0, number - _CONTEXT_WORDS)
            last = re.fullmatch(r"([^\W\d_]{4,})[.!?]+[\"')\u201d\u2019]*", words[number].group())
            if not last or start < free or text[words[number].start() - 1] != " ":
                continue
            context = text[words[start].start() : words[number].start() - 1]
            if re.search(rf"\b{re.escape(last[1])}\b", context, re.IGNORECASE):
                some.append(Item("", context, (" " + last[1],)))
                free = number
        found.append(some)
    return _in_turns(found, dice)


def _clozes(texts: list[str], dice: random.Random) -> Iterator[Item]:
    spans = [list(re.finditer(r"\S+", text)) for text in texts]

    def piece(document: int, first: int) -> str:
        start, end = spans[document][first - 1].end(), spans[document][first + _CHOICE_WORDS - 1].end()
        return texts[document][start:end]

    places = [
        [(number, first) for first in range(_CONTEXT_WORDS, len(words) - _CHOICE_WORDS, _CONTEXT_WORDS + _CHOICE_WORDS)]
        for number, words in enumerate(spans)
    ]
    everywhere = [place for some in places for place in some]
    several = sum(map(bool, places)) > 1
    found: list[list[Item]] = []
    for some in places:
        items: list[Item] = []
        for document, first in some:
            true = piece(document, first)
            others = [
                piece(*place)
                for place in dice.sample(everywhere, min(len(everywhere), 2 * _CANDIDATES))
                if (place[0] != document if several else place[1] != first)
            ]
            context = texts[document][
                spans[document][first - _CONTEXT_WORDS].start() : spans[document][first - 1].end()
            ]
            if item := _among(context, true, others, dice):
                items.append(item)
        found.append(items)
    return _in_turns(found, dice)


def _next_lines(texts: list[str], dice: random.Random) -> Iterator[Item]:
    documents = [text.split("\n") for text in texts]
    everywhere = [line.strip() for lines in documents for line in lines if _is_telling(line)]
    found: list[list[Item]] = []
    for lines in documents:
        own = [line.strip() for line in lines if _is_telling(line)]
        items: list[Item] = []
        for number in range(_CONTEXT_LINES, len(lines), _CONTEXT_LINES // 2):
            line = lines[number].rstrip()
            before = "\n".join(lines[number - _CONTEXT_LINES : number])
            context = before.rstrip()[-_CONTEXT_CHARS:]
            if not _is_telling(line) or not context.strip():
                continue
            # White space between them counts to the continuation; the indent gives nothing away.
            empty = before[len(before.rstrip()) :].count("\n")
            blanks = "\n" * (empty + 1) + line[: len(line) - len(line.lstrip())]
            pool = own if len(set(own)) > _CANDIDATES else everywhere
            seen = {inner.strip() for inner in lines[number - _CONTEXT_LINES : number + 1]}
            others = [blanks + other for other in dice.sample(pool, min(len(pool), _CANDIDATES)) if other not in seen]
            if item := _among(context, blanks + line.lstrip(), others, dice):
                items.append(item)
        found.append(items)
    return _in_turns(found, dice)


def _is_telling(line: str) -> bool:
    """Return whether a line says something: not a bracket, not blank."""
    return len(re.findall(r"\w", line)) >= 6


def _among(context: str, true: str, others: list[str], dice: random.Random) -> Item | None:
    """Return an item with the true continuation among the distractors nearest to it in length."""
    near = sorted({other for other in others if other != true}, key=lambda other: (abs(len(other) - len(true)), other))
    if len(near) < _CHOICES - 1:
        return None
    choices, answer = near[: _CHOICES - 1], dice.randrange(_CHOICES)
    choices.insert(answer, true)
    return Item("", context, tuple(choices), answer)
