"""Numbers as text, and tables in Markdown."""

import math
from collections.abc import Callable, Sequence

from study.effects import over_seeds
from study.logs import Run

MISSING = "–"  # stands for a number that is undefined or not logged

Cell = Callable[[list[Run]], str]  # the text of a cell, from the seeds of a setting


def fixed(value: float, decimals: int) -> str:
    if not math.isfinite(value):
        return MISSING
    return f"{round(value, decimals) + 0.0:.{decimals}f}".replace("-", "\N{MINUS SIGN}")  # + 0.0: no negative zero


def short(value: float) -> str:
    """Two significant digits, but at least one decimal."""
    magnitude = math.floor(math.log10(abs(value))) if value and math.isfinite(value) else 0
    return fixed(value, max(1 - magnitude, 1))


def written(mean: float, half: float) -> str:
    """ "0.352 ± 0.021": to two digits of `half`, to one if these are above 35, and to four decimals at most."""
    if not half > 1e-9 * abs(mean):  # a single seed, or rounding errors alone
        return short(mean)
    decimals = 1 - math.floor(math.log10(half))
    if half * 10**decimals > 35:
        decimals -= 1
    decimals = min(max(decimals, 0), 4)
    return f"{fixed(mean, decimals)} ± {fixed(half, decimals)}"


def over(value: Callable[..., float], scale: float = 1, **options) -> Cell:
    """A cell: `scale` times value(run, **options), mean and interval over seeds; of two seeds both values."""
    def cell(runs: list[Run]) -> str:
        values = [scale * value(run, **options) for run in runs]
        if len(values) == 2 and all(map(math.isfinite, values)):  # a t interval would be far wider
            return ", ".join(map(short, values))
        return written(*over_seeds(values))

    return cell


def row_of(runs: list[Run], columns: dict[str, Callable[..., float]], **options) -> list[str]:
    """A cell per column, of percent where its name says so; `options` are those of all columns."""
    return [over(value, 100 if "%" in name else 1, **options)(runs) for name, value in columns.items()]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; "" if it has no rows."""
    if not rows:
        return ""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows))
