"""Labelled picture grids: the same seeds without and with SPELL."""

from __future__ import annotations

import math
import unicodedata
from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from PIL import Image, ImageDraw, ImageFont, ImageOps

from shielded.runs.report.rows import Diversity, Figure, Row, by_prompt, number

PAPER, INK, MUTED, HAIRLINE, WARNING = "#ffffff", "#1d2126", "#5b636d", "#d9dce0", "#a8430f"
MARGIN, GAP, LABEL = 28, 14, 132  # pixels: outer margin, space between pictures, width of the label column
HEADING, TEXT, LINE = 18, 13, 18  # pixels: two font sizes, and the line height of the smaller one
COLUMNS = 8


def protection_grid(rows: Sequence[Row], radius: float | None = None) -> Image.Image:
    """Draw a block per prompt: the model alone above, SPELL below, and the nearest protected images if given.

    Args:
        rows: at least one.
        radius: radius of all shields, for the heading; None: they differ, or there are none.

    Returns:
        An RGB image on white. Text beyond the built-in font (ASCII) is written without accents or as "?".

    Raises:
        ValueError: there are no rows.
    """
    if not rows:
        raise ValueError("a grid needs at least one row")
    cell = _cell_size([image for row in rows for image in (row.without, row.with_) if image is not None])
    note = "" if radius is None else f"radius {number(radius)}"
    blocks = []
    for prompt, group in by_prompt(rows).items():
        labels = [figure.label for figure in group[0].pictures if figure.label != group[0].beside]
        lines = [
            _Line(label, figures)
            for label, figures in zip(labels, zip(*(row.pictures for row in group), strict=False), strict=False)
        ]
        if any(row.protected for row in group):
            lines.append(_Line("nearest protected image", [Figure("", row.protected) for row in group]))
        blocks.append(_block(prompt, note, [r.seed for r in group], lines, cell))
    return _flow(blocks, LABEL + COLUMNS * (cell[0] + GAP))


def diversity_grid(diversity: Diversity) -> Image.Image:
    """Draw the batch of the model alone above the batch with SPELL, with their Vendi scores; RGB on white."""
    d = diversity
    lines = [
        _Line(f"without SPELL Vendi {number(d.vendi_without)}", [Figure("", image) for image in d.without]),
        _Line(f"with SPELL Vendi {number(d.vendi_with)}", [Figure("", image) for image in d.with_]),
    ]
    cell = _cell_size([*d.without, *d.with_])
    note = f"radius {number(d.radius)} between the images"
    return _flow([_block(d.prompt, note, d.seeds, lines, cell)], LABEL + COLUMNS * (cell[0] + GAP))


def stack(images: Sequence[Image.Image]) -> Image.Image:
    """Put images under each other, left-aligned on white.

    Raises:
        ValueError: there are no images.
    """
    if not images:
        raise ValueError("nothing to stack: give at least one image")
    sheet = Image.new("RGB", (max(i.width for i in images), sum(i.height for i in images)), PAPER)
    top = 0
    for image in images:
        sheet.paste(image, (0, top))
        top += image.height
    return sheet


# ----------------------------------------------------------------------------------------------------------------
# Drawing.


@dataclass(frozen=True)
class _Line:
    label: str
    pictures: Sequence[Figure]

    @property
    def height(self) -> int:
        """Height below the pictures: the captions (if there are any) and some air."""
        return (LINE + GAP + 4) if any(picture.caption for picture in self.pictures) else GAP


def _block(heading: str, note: str, seeds: Sequence[int], lines: Sequence[_Line], cell: tuple[int, int]) -> Image.Image:
    columns = math.ceil(len(seeds) / math.ceil(len(seeds) / COLUMNS))  # 9 seeds: 5 + 4, not 8 + 1
    across, down = cell
    width = LABEL + columns * (across + GAP)
    title = _wrap(heading, HEADING, width - GAP, lines=4)
    names = [_wrap(f"seed {seed}", TEXT, across, lines=3) for seed in seeds]
    seed_height = LINE * max(map(len, names)) + 4
    band_height = seed_height + sum(down + line.height for line in lines)
    title_height = len(title) * (HEADING + 6) + (LINE if note else 0) + 10

    sheet = Image.new("RGB", (width, title_height + band_height * math.ceil(len(seeds) / columns)), PAPER)
    draw = ImageDraw.Draw(sheet)
    _write(draw, (0, 0), title, HEADING, INK)
    _write(draw, (0, title_height - LINE - 10), [_drawable(note)], TEXT, MUTED)
    for start in range(0, len(seeds), columns):
        top = title_height + band_height * (start // columns)
        for i, name in enumerate(names[start : start + columns]):
            _write(draw, (LABEL + i * (across + GAP), top), name, TEXT, MUTED)
        top += seed_height
        for line in lines:
            _write(draw, (0, top + 2), _wrap(line.label, TEXT, LABEL - 36, lines=4), TEXT, INK)
            for i in range(min(columns, len(seeds) - start)):
                _picture(sheet, (LABEL + i * (across + GAP), top), line.pictures[start + i], cell)
            top += down + line.height
    return sheet


def _picture(sheet: Image.Image, corner: tuple[int, int], picture: Figure, cell: tuple[int, int]) -> None:
    left, top = corner
    draw = ImageDraw.Draw(sheet)
    if picture.image is not None:
        tile = _tile(picture.image, cell)
        sheet.paste(tile, corner)
        box = (left - 1, top - 1, left + tile.width, top + tile.height)
        draw.rectangle(box, outline=WARNING if picture.inside else HAIRLINE)
    lines = _wrap(picture.caption, TEXT, cell[0], lines=2)
    _write(draw, (left, top + cell[1] + 4), lines, TEXT, WARNING if picture.inside else MUTED)


def _cell_size(images: Sequence[Image.Image]) -> tuple[int, int]:
    """Width and height of a picture in the grid: the largest one, scaled to a longer side of 128 to 256 pixels."""
    width, height = (max((size[axis] for size in (image.size for image in images)), default=128) for axis in (0, 1))
    scale = min(max(128, width, height), 256) / max(width, height)
    return max(1, round(width * scale)), max(1, round(height * scale))


def _tile(image: Image.Image, cell: tuple[int, int]) -> Image.Image:
    image = image.convert("RGBA")
    flat = Image.alpha_composite(Image.new("RGBA", image.size, PAPER), image).convert("RGB")
    return ImageOps.contain(flat, cell, Image.Resampling.LANCZOS)


def _flow(blocks: Sequence[Image.Image], width: int) -> Image.Image:
    """Set blocks like words: side by side while they fit into `width`, then on the next line."""
    lines: list[list[Image.Image]] = []
    used = 0
    for block in blocks:
        if not lines or used + block.width > width:
            lines.append([])
            used = 0
        lines[-1].append(block)
        used += block.width + MARGIN
    inner = max(sum(b.width for b in line) + MARGIN * (len(line) - 1) for line in lines)
    heights = [max(b.height for b in line) for line in lines]
    sheet = Image.new("RGB", (inner + 2 * MARGIN, sum(heights) + MARGIN * (len(lines) + 1)), PAPER)
    top = MARGIN
    for line, height in zip(lines, heights, strict=True):
        left = MARGIN
        for block in line:
            sheet.paste(block, (left, top))
            left += block.width + MARGIN
        top += height + MARGIN
    return sheet


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)


def _drawable(text: str) -> str:
    """Reduce text to what Pillow's built-in font holds: drop accents, write "?" for other foreign characters."""
    plain = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    return "".join(c if c.isascii() or c in "…·“”’" else "?" for c in " ".join(plain.split()))


def _wrap(text: str, size: int, width: int, lines: int) -> list[str]:
    """Break text into at most `lines` lines of `width` pixels; what does not fit ends in an ellipsis."""

    def length(t: str) -> float:
        return _font(size).getlength(t)

    done, line = [], ""
    for word in _drawable(text).split():
        if length(f"{line} {word}".strip()) <= width:
            line = f"{line} {word}".strip()
            continue
        if line:
            done.append(line)
        while length(word) > width:
            cut = bisect(range(len(word)), width, key=lambda i, w=word: length(w[: i + 1]))
            done.append(word[:cut])
            word = word[cut:]
        line = word
    if line:
        done.append(line)
    if len(done) > lines:
        last = done[lines - 1]
        while length(last + "…") > width:
            last = last[:-1]
        done = [*done[: lines - 1], last + "…"]
    return done


def _write(draw: ImageDraw.ImageDraw, corner: tuple[int, int], lines: Sequence[str], size: int, fill: str) -> None:
    for i, line in enumerate(lines):
        draw.text((corner[0], corner[1] + i * (LINE if size == TEXT else size + 6)), line, fill, font=_font(size))
