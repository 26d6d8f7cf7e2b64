"""Plain-text and markdown tables of numbers with intervals."""

import math
from collections.abc import Sequence

from calm.core.intervals import Interval


def interval_text(interval: Interval | None, digits: int = 2) -> str:
    """`5.80 [5.41, 6.20]`; a dash for what was not measured, the bare estimate where there is no interval."""
    if interval is None or math.isnan(interval.estimate):
        return "-"
    if math.isnan(interval.low):
        return f"{interval.estimate:.{digits}f}"
    return f"{interval.estimate:.{digits}f} [{interval.low:.{digits}f}, {interval.high:.{digits}f}]"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, markdown: bool = False) -> str:
    """Columns padded to their widest cell: the first flush left, the others flush right. `markdown` adds the bars."""
    cells = [list(header), *[list(row) for row in rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]

    def line(row: Sequence[str]) -> str:
        padded = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        padded[0] = row[0].ljust(widths[0])
        return "| " + " | ".join(padded) + " |" if markdown else "  ".join(padded).rstrip()

    if markdown:
        rule = "|" + "|".join("-" * (width + 2) if not i else "-" * (width + 1) + ":" for i, width in enumerate(widths)) + "|"
    else:
        rule = "  ".join("-" * width for width in widths)
    return "\n".join([line(cells[0]), rule, *map(line, cells[1:])])
