"""Tables on the console, as `page.table` is one in HTML."""

from collections.abc import Container, Sequence


def text_table(rows: Sequence[Sequence[str]], headers: Sequence[str] = (), words: Container[int] = (0,)) -> str:
    """Cells in aligned columns, two blanks apart: the columns of these numbers to the left, the others to the right.

    The last cell of a row with fewer cells than the others runs over the columns that it lacks.
    """
    lines = [row for row in (headers, *rows) if any(row)]
    columns = max(map(len, lines), default=0)
    widths = [0] * columns
    for row in lines:
        for column, cell in enumerate(row if len(row) == columns else row[:-1]):
            widths[column] = max(widths[column], len(cell))
    return "\n".join(_line(row, widths, words) for row in lines)


def _line(row: Sequence[str], widths: Sequence[int], words: Container[int]) -> str:
    is_short = len(row) < len(widths)
    cells = [
        cell.ljust(width) if column in words or (is_short and column == len(row) - 1) else cell.rjust(width)
        for column, (cell, width) in enumerate(zip(row, widths, strict=False))
    ]
    return "  ".join(cells).rstrip()
