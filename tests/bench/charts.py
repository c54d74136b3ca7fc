"""Bar charts as SVG. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from bench.results import Value

ROW, LABELS, BARS, FIGURES = 24, 230, 420, 110  # pixels
OURS, OTHERS = "#1b7837", "#8899aa"
STYLE = 'font-family="sans-serif" font-size="13"'


def bars(title: str, rows: Sequence[tuple[str, Value, bool]], digits: int = 0) -> str:
    """A bar for each (label, value, whether it is this project's), with a line from the least to the most."""
    greatest = max((value.high for _, value, _ in rows), default=0.0) or 1.0
    height, width = ROW * (len(rows) + 1) + 12, LABELS + BARS + FIGURES
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">',
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
        f'<text x="8" y="18" {STYLE} font-weight="bold">{escape(title)}</text>',
    ]
    for number, (label, value, ours) in enumerate(rows, 1):
        lines.append(_bar(ROW * number + 6, label, value, BARS / greatest, OURS if ours else OTHERS, digits))
    return "\n".join([*lines, "</svg>", ""])


def _bar(top: int, label: str, value: Value, scale: float, colour: str, digits: int) -> str:
    end, low, high = (round(LABELS + scale * part, 1) for part in (value.median, value.low, value.high))
    middle, text = top + 9, f"{value.median:,.{digits}f}"
    return (
        f'<text x="{LABELS - 8}" y="{top + 13}" {STYLE} text-anchor="end">{escape(label)}</text>'
        f'<rect x="{LABELS}" y="{top}" width="{end - LABELS:.1f}" height="18" fill="{colour}"/>'
        f'<line x1="{low}" y1="{middle}" x2="{high}" y2="{middle}" stroke="#222" stroke-width="2"/>'
        f'<text x="{high + 8}" y="{top + 13}" {STYLE}>{text}</text>'
    )
