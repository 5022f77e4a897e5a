"""Journals as a picture: one panel each, one row per rank, every bubble in the colour of its cause."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_tspipe.journal import LOAD, Journal

if TYPE_CHECKING:
    from PIL import ImageDraw

WORK = {"T": "#4c78a8", "F": "#54a24b", "B": "#f58518", "I": "#f58518", "W": "#eeca3b"}
AHEAD = "#9ecae9"  # teacher forwards for the next batch
IDLE = {"T": "#dbe7f3", "F": "#dcefd9", "B": "#fde3c8", LOAD: "#d9c6e8", "between steps": "#bbbbbb"}
IDLE["runtime"] = "#e8e8e8"
EDGE = "#c02020"  # around a wait for a message
LEGEND = [("teacher", WORK["T"]), ("teacher, next batch", AHEAD), ("student forward", WORK["F"]),
          ("backward, or its inputs", WORK["B"]), ("its weights", WORK["W"]), ("waits for T", IDLE["T"]),
          ("waits for F", IDLE["F"]), ("waits for B", IDLE["B"]), ("loads", IDLE[LOAD]),
          ("between steps", IDLE["between steps"]), ("runtime", IDLE["runtime"])]  # fmt: skip
WIDTH, LEFT, ROW, GAP, LINE = 1800, 60, 34, 6, 17  # pixels


def draw_png(path: str | Path, journals: Mapping[str, Journal], windows: Mapping[str, tuple[float, float]]) -> None:
    """Write a PNG; all panels have the same scale.

    Args:
        path: the file.
        journals: by name, such as "measured" and "planned".
        windows: by the same names, which seconds to draw: the first is at the left edge.

    Raises:
        ModuleNotFoundError: Pillow is not installed.
    """
    try:
        from PIL import Image, ImageDraw
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("The picture is drawn by Pillow. Install it: pip install pillow") from error
    scale = (WIDTH - LEFT - 10) / (max(end - begin for begin, end in windows.values()) or 1.0)
    heights = [_height(journal) for journal in journals.values()]
    image = Image.new("RGB", (WIDTH, sum(heights) + 3 * LINE), "white")
    drawing = ImageDraw.Draw(image)
    top = _legend(drawing)
    for (name, journal), height in zip(journals.items(), heights, strict=True):
        _panel(drawing, name, journal, windows[name], scale, top)
        top += height
    image.save(path)


def _height(journal: Journal) -> int:
    ranks = len(journal.ranks)
    return 2 * LINE + ranks * (ROW + GAP) + (ranks + 1) * LINE


def _legend(drawing: ImageDraw.ImageDraw) -> int:
    left = LEFT
    for text, colour in LEGEND:
        drawing.rectangle((left, 8, left + 14, 22), fill=colour, outline="black")
        drawing.text((left + 20, 8), text, fill="black", font=_font())
        left += 30 + int(drawing.textlength(text, font=_font())) + 14
    drawing.text((left, 8), "F0<1: waits for F0 of rank 1", fill=EDGE, font=_font())
    return 2 * LINE


def _panel(
    drawing: ImageDraw.ImageDraw, name: str, journal: Journal, window: tuple[float, float], scale: float, top: int
) -> None:
    seconds, *table = journal.summary().splitlines()
    drawing.text((10, top), f"{name}: {seconds}", fill="black", font=_font())
    top += LINE + 4
    for rank, row in enumerate(journal.ranks):
        upper = top + rank * (ROW + GAP)
        drawing.text((10, upper + 9), f"rank {rank}", fill="black", font=_font())
        boxes = [(b.begin, b.end, IDLE[b.kind], EDGE if b.source else None,
                  f"{b.source[1].name}<{b.source[0]}" if b.source else "") for b in journal.bubbles(rank)]  # fmt: skip
        boxes += [(e.start, e.end, AHEAD if e.ahead else WORK[e.kind], "white", e.name) for e in row if e.kind != LOAD]
        for begin, end, colour, edge, text in boxes:
            left, right = (LEFT + (min(max(at, window[0]), window[1]) - window[0]) * scale for at in (begin, end))
            if right - left >= 1:
                wide = right - left > 3  # what is narrower would be all edge
                drawing.rectangle((left, upper, right, upper + ROW), fill=colour, outline=edge if wide else None)
            if drawing.textlength(text, font=_font()) < right - left - 4:
                drawing.text((left + 3, upper + 9), text, fill="black", font=_font())
    below = top + len(journal.ranks) * (ROW + GAP)
    cells = [[cell.strip() for cell in line.split("|")] for line in table if "|" in line]
    for number, line in enumerate(cells):
        for column, text in enumerate(line):
            drawing.text((LEFT + 130 * column, below + LINE * number), text, fill="black", font=_font())


def _font() -> Any:
    from PIL import ImageFont

    return ImageFont.load_default()
