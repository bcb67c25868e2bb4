"""Numbers as a person reads them: 134.5M, 4.61, 12 min 5 s; and what to say where one is missing."""

import math
from collections.abc import Sequence

NOT_RECORDED = "not recorded"
NONE = "\u2013"  # in a table cell, where two words would be noise
NOT_FINITE = "not finite"

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def nats(value: float | None, digits: int = 2) -> str:
    """Return a loss: 4.61.

    Example:
        >>> nats(4.6123), nats(None), nats(float("nan"))
        ('4.61', '–', 'not finite')
    """
    if value is None:
        return NONE
    if not math.isfinite(value):
        return NOT_FINITE
    return f"{value:.{digits}f}" if abs(value) < 1e6 else scientific(value)


def signed(value: float | None, digits: int = 3) -> str:
    """Return a change with its sign.

    Example:
        >>> signed(0.1), signed(-0.6), signed(0.0), signed(None)
        ('+0.100', '\u22120.600', '0.000', '\u2013')
    """
    shown = nats(value, digits)
    if value is None or not math.isfinite(value) or not shown.strip("-0."):
        return shown.removeprefix("-")  # a zero has no sign, also one that rounding has made
    return f"\u2212{shown[1:]}" if value < 0 else f"+{shown}"


def exact(value: float | None) -> str:
    """Return a count with all its digits: 40,960."""
    if value is None:
        return NONE
    if not math.isfinite(value):
        return NOT_FINITE
    return f"{round(value):,}" if abs(value) < 1e15 else scientific(value)


def count(value: float | None) -> str:
    """Return a count: exact below a million, then with a unit.

    Example:
        >>> count(40_960), count(134_515_008), count(1_236_000_000)
        ('40,960', '134.5M', '1.24B')
    """
    if value is None or not math.isfinite(value) or abs(value) < 1e6:
        return exact(value)
    # 999.96M would be rounded to 1000.0M: the next unit begins a little early.
    for limit, unit, digits in ((0.99995e9, "M", 1), (0.999995e12, "B", 2), (0.999995e15, "T", 2)):
        if abs(value) < limit:
            return f"{value / {'M': 1e6, 'B': 1e9, 'T': 1e12}[unit]:.{digits}f}{unit}"
    return scientific(value)


def quantity(value: float | None) -> str:
    """Return a positive number of unknown size (a perplexity, a speed) with three digits or more.

    Example:
        >>> quantity(21.234), quantity(0.0312), quantity(4711.2), quantity(3e9)
        ('21.2', '0.0312', '4,711', '3.0 × 10⁹')
    """
    if value is None:
        return NONE
    if not math.isfinite(value):
        return NOT_FINITE
    if value == 0:
        return "0"
    if abs(value) >= 1e7 or abs(value) < 1e-3:
        return scientific(value)
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{digits}f}"


def scientific(value: float) -> str:
    """Return `value` as 1.2 × 10¹⁵."""
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa} \u00d7 10{str(int(exponent)).translate(_SUPERSCRIPTS)}"


def percent(share: float) -> str:
    """Return a share as a whole percentage that says 0% and 100% only where that is exact.

    Example:
        >>> percent(0.767), percent(0.999), percent(0.001), percent(1.0)
        ('77%', 'over 99%', 'under 1%', '100%')
    """
    if not math.isfinite(share * 100):
        return NOT_FINITE
    if 0.995 <= share < 1:
        return "over 99%"
    if 0 < share < 0.005:
        return "under 1%"
    return f"{share * 100:,.0f}%" if abs(share) < 1e4 else scientific(share * 100) + "%"


def duration(seconds: float | None) -> str | None:
    """Return a time in its two largest units: 12 min 5 s.

    Example:
        >>> duration(8.25), duration(725), duration(11_520), duration(200_000)
        ('8.2 s', '12 min 5 s', '3 h 12 min', '2 d 7 h')
    """
    if seconds is None or not math.isfinite(seconds):
        return None
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    for large, small, size, part in (("min", "s", 60, 1), ("h", "min", 3600, 60), ("d", "h", 86_400, 3600)):
        if whole < size * (24 if large == "h" else 60) or large == "d":
            rest = whole % size // part
            return f"{whole // size:,} {large}" + (f" {rest} {small}" if rest else "")
    return None


def size(num_bytes: float | None) -> str | None:
    """Return a number of bytes: 1.5 GB."""
    if num_bytes is None or not math.isfinite(num_bytes):
        return None
    for limit, unit in ((1e15, "TB"), (1e12, "GB"), (1e9, "MB"), (1e6, "kB")):
        factor = limit / 1e3
        if num_bytes >= factor:
            return f"{num_bytes / factor:,.1f} {unit}"
    return f"{num_bytes:.0f} bytes"


def article(number: float) -> str:
    """Return the article that `number` takes when it is read aloud: "an" 8, 11, 18, 80, 8,000; else "a"."""
    digits = str(round(number))
    leading = digits[: len(digits) % 3 or 3]
    return "an" if digits.startswith("8") or leading in {"11", "18"} else "a"


def index_ranges(indices: Sequence[int]) -> str:
    """Return indices with runs drawn together.

    Example:
        >>> index_ranges([0, 1, 2, 5, 7, 8])
        '0–2, 5, 7, 8'
    """
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    return ", ".join(f"{run[0]}\u2013{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)


def listing(words: Sequence[str]) -> str:
    """Return words as a person lists them: a, b and c."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}" if words else ""
