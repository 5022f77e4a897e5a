"""Text in columns."""

from __future__ import annotations

from collections.abc import Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns.

    >>> print(table(["rank", "work"], [["0", "97 %"]]))
    rank | work
    -----+-----
    0    | 97 %
    """
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
             for row in (header, *rows)]  # fmt: skip
    return "\n".join([lines[0], "-+-".join("-" * width for width in widths), *lines[1:]])
