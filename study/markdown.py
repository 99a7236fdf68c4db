"""Numbers as text, and tables in Markdown."""

import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence

from files import UserError
from study.effects import over_seeds
from study.logs import Run

TABLE_IN_PAGE = re.compile(r"<!-- table: (\w+) -->\n(.*?)\n?<!-- /table -->", re.DOTALL)

Cell = Callable[[list[Run]], str]  # the text of a cell, from the seeds of a setting
# A column's name -> a text, a cell, or (function, *its arguments after the run), in percent if the name says so.
Columns = dict[str, str | Cell | tuple]


def fixed(value: float, decimals: int) -> str:
    if not math.isfinite(value):  # undefined or not logged
        return "–"
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


def over(value: Callable[..., float], scale: float = 1, *arguments) -> Cell:
    """A cell: `scale` times value(run, *arguments), mean and interval over seeds; of two seeds both values."""
    def cell(runs: list[Run]) -> str:
        values = [scale * value(run, *arguments) for run in runs]
        if len(values) == 2 and all(map(math.isfinite, values)):  # a t interval would be far wider
            return ", ".join(map(short, values))
        return written(*over_seeds(values))

    return cell


def row(runs: list[Run], columns: Columns) -> dict[str, str]:
    """The text of each column of these runs."""
    texts = {}
    for name, column in columns.items():
        if isinstance(column, tuple):
            value, *arguments = column
            column = over(value, 100 if "%" in name or "points" in name else 1, *arguments)
        texts[name] = column if isinstance(column, str) else column(runs)
    return texts


def table(rows: Sequence[dict[str, str]], transposed: bool = False) -> str:
    """A table in Markdown of these rows, or columns if `transposed`; "" if there are none."""
    if not rows:
        return ""
    lines = [list(rows[0]), *(list(row.values()) for row in rows)]
    if transposed:
        lines = list(zip(*lines))
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def with_tables(text: str, tables: Mapping[str, Callable[[], str]], page: str, check: bool) -> tuple[str, int]:
    """The text of a page with the current `tables`, and their number; with `check` one that differs is refused."""
    def replace(match: re.Match) -> str:
        name, body = match.groups()
        if name not in tables:
            raise UserError(f"{page}: there is no table {name!r}; there are: {', '.join(tables)}")
        expected = tables[name]() or "*No run of this kind is in res/ yet.*"
        if check and body != expected:
            pairs = itertools.zip_longest(body.split("\n"), expected.split("\n"), fillvalue="")
            row, logged = next((row, logged) for row, logged in pairs if row != logged)
            raise UserError(f"{page}, table {name}: {row!r}, and the logs give {logged!r}; run python -m study.tables")
        return f"<!-- table: {name} -->\n{expected}\n<!-- /table -->"

    return TABLE_IN_PAGE.subn(replace, text)
