"""Tables as HTML. Every text is escaped here, so that no caller can forget it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

__all__ = ["Cell", "table"]


@dataclass(frozen=True, kw_only=False, slots=True)
class Cell:
    """One cell.

    Attributes:
        text: Shown as it is.
        is_header: Of its row.
        heat: Share (0 to 1) of the colour behind it.
        is_changed: Marks it.
    """

    text: str
    is_header: bool = False
    heat: float = 0.0
    is_changed: bool = False


def table(header: Sequence[str], rows: Sequence[Sequence[Cell | str]], *, kind: str = "") -> str:
    """Return a table that scrolls sideways by itself where it is wider than the page.

    Args:
        header: Names of the columns; none for no header.
        rows: Cells of each row.
        kind: Class of the table.
    """
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in header)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    return (
        f'<div class="wide"><table class="{escape(kind)}">{f"<thead><tr>{head}</tr></thead>" if header else ""}'
        f"<tbody>{body}</tbody></table></div>"
    )


def _cell(cell: Cell | str) -> str:
    if isinstance(cell, str):
        return f"<td>{escape(cell)}</td>"
    if cell.is_header:
        return f'<th scope="row">{escape(cell.text)}</th>'
    style = f' style="--heat:{round(100 * cell.heat)}%"' if cell.heat else ""
    kind = ' class="changed"' if cell.is_changed else ""
    return f"<td{kind}{style}>{escape(cell.text)}</td>"
