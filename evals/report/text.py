"""Numbers and names as reports print them."""

from __future__ import annotations

import json
import math
from typing import Any

_SIZES = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def number(value: Any) -> float | None:
    """A finite number, or None for anything else: None, NaN, a text, true."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if math.isfinite(found) else None


def clean(value: Any) -> str:
    """A text in one line that can be encoded: no control characters, no lone surrogates."""
    text = str(value).encode("utf-8", "replace").decode("utf-8")
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def plain(value: Any) -> str:
    """Any value of JSON as a short text: of options, say."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, float):
        return "–" if math.isnan(value) else f"{value:.10g}"
    if isinstance(value, list | tuple):
        return " ".join(map(plain, value)) if value else "none"
    if isinstance(value, dict):
        return clean(json.dumps(value, sort_keys=True, default=str))
    return clean(value)


def shorten(text: str, limit: int) -> str:
    """At most `limit` characters, the last an ellipsis where there were more."""
    return text if len(text) <= limit else text[: limit - 1].rstrip(" ,") + "…"


def significant(value: Any, digits: int = 3, sign: bool = False, suffix: str = "") -> str:
    """A number to some significant digits, its zeros kept; a dash where there is none."""
    x = number(value)
    if x is None:
        return "–"
    plus = "+" if sign and x > 0 else ""
    if x == 0:
        return f"0{suffix}"
    exponent = math.floor(math.log10(abs(float(f"{x:.{digits - 1}e}"))))
    if -4 <= exponent < 6:
        return f"{plus}{x:,.{max(0, digits - 1 - exponent)}f}{suffix}".replace("-", "−")
    mantissa, power = f"{x:.{digits - 1}e}".split("e")
    return f"{plus}{mantissa}e{int(power)}{suffix}".replace("-", "−")


def fixed(value: Any, places: int = 2, suffix: str = "", sign: bool = False) -> str:
    """A number with some decimal places; a dash where there is none."""
    x = number(value)
    if x is None:
        return "–"
    text = f"{x:{'+' if sign else ''},.{places}f}"
    if float(text.replace(",", "")) == 0:  # no sign on what rounds to nothing
        text = text.lstrip("+-")
    return (text + suffix).replace("-", "−")


def times(value: Any) -> str:
    """A ratio."""
    return fixed(value, 2, "×")


def share(value: Any, places: int = 1, sign: bool = False) -> str:
    """A share of one, in percent."""
    x = number(value)
    return fixed(None if x is None else 100 * x, places, "%", sign)


def change(value: Any) -> str:
    """A change by a share of one, in percent, with its sign."""
    return share(value, 2, sign=True)


def whole(value: Any) -> str:
    """A whole number with its thousands marked."""
    return fixed(value, 0)


def figure(value: Any) -> str:
    """A figure that nothing is known of; a short text of what is none."""
    if number(value) is None:
        return "–" if value is None else shorten(plain(value), 80)
    return whole(value) if isinstance(value, int) else significant(value, 4)


def size(value: Any) -> str:
    """Bytes in a unit that leaves one to four digits before the point."""
    x = number(value)
    if x is None:
        return "–"
    power = 0
    while abs(x) >= 1024 and power < len(_SIZES) - 1:
        x, power = x / 1024, power + 1
    places = 0 if power == 0 or x >= 100 else 1 if x >= 10 else 2
    return f"{x:,.{places}f} {_SIZES[power]}".replace("-", "−")


def thousands(value: float) -> str:
    """Tokens as an axis prints them: 512, 32k (of 1,024) or 10,000."""
    n = round(value)
    return f"{n // 1024:,}k" if n >= 1024 and n % 1024 == 0 else f"{n:,}"


def count(n: int, one: str) -> str:
    """`1 row`, `2 rows`."""
    return f"{n:,} {one if n == 1 else one + 's'}"
