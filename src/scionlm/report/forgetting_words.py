"""What a continued model learned and forgot, in sentences: for the top of its page and for the section."""

import math

from scionlm.report.collect import Run
from scionlm.report.forgetting_read import Forgetting, Side
from scionlm.report.html import Content, Markup, join, name_of, tag
from scionlm.report.settings_read import settings_of, source_label
from scionlm.report.values import number
from scionlm.report.wording import count, nats, signed

# Below it a change has no sign that a person should read anything into.
_NOTHING = 0.0005
_MAX_NAMES = 6


def amount(value: float) -> str:
    """Return a change without its sign, a small one with a digit more.

    Example:
        >>> amount(0.6), amount(-0.031), amount(0.0996)
        ('0.60', '0.031', '0.10')
    """
    return nats(abs(value), _digits(value))


def continued_lead(run: Run, forgetting: Forgetting | None) -> Markup | None:
    """Return the sentence that stands on top of the page; None where nothing is known of both sides."""
    sides = [(name, side) for name, side in _sides(forgetting) if side.change is not None]
    if forgetting is None or not sides:
        return None
    parts: list[Content] = ["Continued from ", *_source(run), _tokens(run), ": "]
    for k, (name, side) in enumerate(sides):
        tone = "child" if name == "downstream" else "upstream"
        after = tag("strong", f"{nats(side.after)}\u00a0nats", class_=tone)
        parts += [", " if k else "", f"{name} {nats(side.before)} \u2192 ", after]
    return tag("p", *parts, f": {_balance(forgetting)}.", class_="lead")


def continued_tiles(forgetting: Forgetting | None) -> list[tuple[str, str]]:
    """Return what was learned, forgotten, and the difference, each with what it is; none where nothing is known."""
    if forgetting is None:
        return []
    tiles: list[tuple[str, str]] = []
    gained, lost, net = forgetting.adaptation, forgetting.forgetting, forgetting.net
    if gained is not None and forgetting.downstream is not None:
        tiles.append((signed(gained, _digits(gained)), f"nats gained downstream: {_from_to(forgetting.downstream)}"))
    if lost is not None and forgetting.upstream is not None:
        tiles.append((signed(lost, _digits(lost)), f"nats forgotten upstream: {_from_to(forgetting.upstream)}"))
    if net is not None:
        tiles.append((signed(net, _digits(net)), "nats net, gained less forgotten"))
    return tiles


def _from_to(side: Side) -> str:
    return f"{nats(side.before)} to {nats(side.after)}"


def _digits(value: float) -> int:
    return 2 if abs(value) >= 0.0995 else 3


def _sides(forgetting: Forgetting | None) -> list[tuple[str, Side]]:
    if forgetting is None:
        return []
    sides = (("downstream", forgetting.downstream), ("upstream", forgetting.upstream))
    return [(name, side) for name, side in sides if side is not None]


def _source(run: Run) -> list[Content]:
    source = run.source
    of = [f"{source.num_layers:,} layers"] if source and source.num_layers is not None else []
    of += [f"{count(source.num_parameters)} parameters"] if source and source.num_parameters is not None else []
    name = name_of(source_label(source.name)) if source and source.name else "a source without a name"
    branch = settings_of(run).get("branch")
    of += [f"branched off at its {branch}"] if branch else []
    return [name, f" ({', '.join(of)})" if of else ""]


def _tokens(run: Run) -> str:
    tokens, so_far = number(run.child.training, "tokens"), run.child.curves.last_tokens
    if tokens is not None:
        return f" on {count(tokens)} tokens"
    return f" on {count(so_far)} tokens so far" if so_far is not None else ""


def _balance(forgetting: Forgetting) -> str:
    """Return "forgets 0.10, gains 0.60", as far as both are known."""
    lost, gained = forgetting.forgetting, forgetting.adaptation
    words: list[str] = []
    if lost is not None:
        words.append(forgets_words(lost))
    if gained is not None:
        words.append(gains_words(gained))
    return ", ".join(words)


def forgets_words(lost: float) -> str:
    """Return how much is forgotten; below 0 the old text is better known than before."""
    if abs(lost) < _NOTHING:
        return "forgets nothing"
    return f"forgets {amount(lost)}" if lost > 0 else f"forgets nothing (upstream is {amount(lost)} better)"


def gains_words(gained: float) -> str:
    """Return how much is learned; below 0 the new text is known less than before."""
    if abs(gained) < _NOTHING:
        return "gains nothing"
    return f"gains {amount(gained)}" if gained > 0 else f"loses {amount(gained)} downstream too"


def told(run: Run, forgetting: Forgetting) -> list[Markup]:
    """Return what came of it in plain words, and what is worth knowing of the way there."""
    said: list[Content] = []
    new, old = forgetting.downstream, forgetting.upstream
    so_far = "" if forgetting.final else "so far "
    if new is not None and new.change is not None:
        said += [so_far.capitalize(), "On the new text" if not so_far else "on the new text", *_names(new)]
        said.append(f" the loss {_moved(new)}: {_learned(-new.change)}. ")
    if old is not None and old.change is not None:
        said += ["On what it knew before", *_names(old), f" it {_moved(old)}: {_forgotten(old.change)}. "]
    elif forgetting.final:
        said.append("What it forgot is not known: no text that it knew before was measured. ")
    net = forgetting.net
    if net is not None:
        said.append(_net(net))
    return [tag("p", *said), *_way(run, forgetting)]


def _names(side: Side) -> list[Content]:
    shown = [[", " if k else "", name_of(name, 40)] for k, name in enumerate(side.domains[:_MAX_NAMES])]
    more = len(side.domains) - _MAX_NAMES
    return [" (", shown, f" and {more} more" if more > 0 else "", ")"] if shown else []


def _moved(side: Side) -> str:
    if side.change is None or abs(side.change) < _NOTHING:
        return f"stayed at {nats(side.after)} nats"
    digits = _digits(side.change)
    verb = "rose" if side.change > 0 else "fell"
    return f"{verb} from {nats(side.before, digits)} to {nats(side.after, digits)} nats"


def _learned(gained: float) -> str:
    if abs(gained) < _NOTHING:
        return "it learned nothing that shows"
    return f"{amount(gained)} learned" if gained > 0 else f"{amount(gained)} lost, although this is what it trained on"


def _forgotten(lost: float) -> str:
    if abs(lost) < _NOTHING:
        return "nothing forgotten"
    return f"{amount(lost)} forgotten" if lost > 0 else f"nothing forgotten, but {amount(lost)} gained there too"


def _net(net: float) -> str:
    if abs(net) < _NOTHING:
        return "What it learned and what it forgot are worth the same, nat for nat."
    if net > 0:
        return f"Nat for nat that is {amount(net)} better than its source."
    return f"Nat for nat that is {amount(net)} worse than its source: it forgot more than it learned."


def _way(run: Run, forgetting: Forgetting) -> list[Markup]:
    said: list[str] = []
    old = forgetting.upstream
    peak, settings = old.peak if old else None, settings_of(run)
    if old is not None and peak is not None and old.before is not None and old.after is not None:
        rise, kept = peak.nll - old.before, old.after - old.before
        if rise > max(kept, 0.0) + 0.01 and rise > _NOTHING:
            back = (rise - kept) / rise
            share = "all of that" if back >= 1 else f"{100 * back:.0f}% of that rise"
            last = run.child.curves.last_step
            part = f", {_share(peak.step / last)} of the way in" if last and forgetting.final else ""
            said.append(
                f"On the way the old text was at {nats(peak.nll)} nats (step {peak.step:,}{part}); {share} came back "
                "with more training."
            )
    replay = settings.get("replay")
    if replay is not None:
        none, by_stage = "No earlier text was replayed.", ", by stage" if ", " in replay else ""
        said.append(none if replay == "none" else f"Earlier text was replayed{by_stage}: {replay} of every batch.")
    return [join(tag("p", " ".join(said), class_="note"))] if said else []


def _share(share: float) -> str:
    return f"{100 * share:.1f}%" if math.isfinite(share) and share < 0.1 else f"{100 * share:.0f}%"
