"""Labelled picture grids: the same seeds without and with SPELL."""

import math
import unicodedata
from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from PIL import Image, ImageDraw, ImageFont, ImageOps

from shielded.certificates.certificate import Certificate

PAPER, INK, MUTED, HAIRLINE, WARNING = "#ffffff", "#1d2126", "#5b636d", "#d9dce0", "#a8430f"
MARGIN, GAP, LABEL = 28, 14, 132  # pixels: outer margin, space between pictures, width of the label column
HEADING, TEXT, LINE = 18, 13, 18  # pixels: two font sizes, and the line height of the smaller one
COLUMNS = 8


@dataclass(frozen=True)
class Picture:
    """One picture as grid and page show it.

    Args:
        label: how it was made.
        image: None if it was refused.
        caption: what its certificate says of it, in a few words.
        inside: whether its certificate says that it lies inside a shield.
    """

    label: str
    image: Image.Image | None
    caption: str = ""
    inside: bool = False


@dataclass(frozen=True)
class Row:
    """One seed, without and with SPELL.

    Args:
        prompt: text the images were made from.
        seed: seed of both images.
        without: image of the model alone.
        with_: image of the same seed with SPELL; None if it was refused.
        certificate_without: measurement of `without` against the protected set; None without a set.
        certificate_with: measurement of `with_`; None without a set, or if the image was refused.
        protected: the nearest protected image; None when it is not to be shown.
    """

    prompt: str
    seed: int
    without: Image.Image
    with_: Image.Image | None
    certificate_without: Certificate | None = None
    certificate_with: Certificate | None = None
    protected: Image.Image | None = None

    @property
    def distance_without(self) -> float | None:
        """Latent L2 distance from `without` to its nearest protected image; None: not measured."""
        return None if self.certificate_without is None else self.certificate_without.nearest_distance

    @property
    def distance_with(self) -> float | None:
        """Latent L2 distance from `with_` to its nearest protected image; None: not measured."""
        return None if self.certificate_with is None else self.certificate_with.nearest_distance

    @property
    def pictures(self) -> list[Picture]:
        """The pictures of this seed from top to bottom."""
        refused = "refused" if self.with_ is None else ""
        pictures = [
            Picture("without SPELL", self.without, caption(self.certificate_without), leaks(self.certificate_without)),
            Picture("with SPELL", self.with_, refused or caption(self.certificate_with), leaks(self.certificate_with)),
        ]
        return pictures if self.protected is None else [*pictures, Picture("nearest protected", self.protected)]


@dataclass(frozen=True)
class Diversity:
    """One prompt and one batch of seeds, without and with SPELL between the images of the batch.

    Args:
        prompt: text the images were made from.
        seeds: seed of each image.
        without: images of the model alone, in the order of `seeds`.
        with_: images of the same seeds with SPELL.
        vendi_without: Vendi score of `without`: the effective number of different images.
        vendi_with: Vendi score of `with_`.
        radius: L2 distance in the latent space that SPELL kept between the images.

    Raises:
        ValueError: the lists are empty or differ in length.
    """

    prompt: str
    seeds: Sequence[int]
    without: Sequence[Image.Image]
    with_: Sequence[Image.Image]
    vendi_without: float
    vendi_with: float
    radius: float

    def __post_init__(self):
        sizes = len(self.seeds), len(self.without), len(self.with_)
        if len(set(sizes)) > 1 or not sizes[0]:
            raise ValueError(f"seeds, without and with_ need the same number of entries, at least one; got {sizes}")


def protection_grid(rows: Sequence[Row], radius: float | None = None) -> Image.Image:
    """Draws a block per prompt: the model alone above, SPELL below, and the nearest protected images if given.

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
        without, with_, *_ = zip(*(row.pictures for row in group), strict=False)
        lines = [_Line("without SPELL", without), _Line("with SPELL", with_)]
        if any(row.protected for row in group):
            lines.append(_Line("nearest protected image", [Picture("", row.protected) for row in group]))
        blocks.append(_block(prompt, note, [r.seed for r in group], lines, cell))
    return _flow(blocks, LABEL + COLUMNS * (cell[0] + GAP))


def diversity_grid(diversity: Diversity) -> Image.Image:
    """Draws the batch of the model alone above the batch with SPELL, with their Vendi scores; RGB on white."""
    d = diversity
    lines = [
        _Line(f"without SPELL Vendi {number(d.vendi_without)}", [Picture("", image) for image in d.without]),
        _Line(f"with SPELL Vendi {number(d.vendi_with)}", [Picture("", image) for image in d.with_]),
    ]
    cell = _cell_size([*d.without, *d.with_])
    note = f"radius {number(d.radius)} between the images"
    return _flow([_block(d.prompt, note, d.seeds, lines, cell)], LABEL + COLUMNS * (cell[0] + GAP))


def stack(images: Sequence[Image.Image]) -> Image.Image:
    """Puts images under each other, left-aligned on white.

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


def by_prompt(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Groups rows by prompt, in the order in which the prompts first appear."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.prompt, []).append(row)
    return groups


def number(value: float | None) -> str:
    """Writes a number for a reader: two decimals, or three digits below 1."""
    if value is None:
        return "not measured"
    return f"{value:.2f}" if abs(value) >= 1 else f"{value:.3g}"


def caption(certificate: Certificate | None) -> str:
    """Write the distance and the verdict of a certificate: "9.53 · inside"; "" without a certificate."""
    if certificate is None:
        return ""
    verdict = "outside"
    if certificate.inside:  # the nearest shield of a latent leak is the one that it lies in
        verdict = "inside" if certificate.nearest_distance < certificate.radius else "inside once decoded"
    return f"{number(certificate.nearest_distance)} · {verdict}"


def leaks(certificate: Certificate | None) -> bool:
    """Read from a certificate whether its image lies inside a shield."""
    return certificate is not None and certificate.inside


# ----------------------------------------------------------------------------------------------------------------
# Drawing.


@dataclass(frozen=True)
class _Line:
    label: str
    pictures: Sequence[Picture]

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


def _picture(sheet: Image.Image, corner: tuple[int, int], picture: Picture, cell: tuple[int, int]) -> None:
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
    width, height = max(image.width for image in images), max(image.height for image in images)
    scale = min(max(128, width, height), 256) / max(width, height)
    return max(1, round(width * scale)), max(1, round(height * scale))


def _tile(image: Image.Image, cell: tuple[int, int]) -> Image.Image:
    image = image.convert("RGBA")
    flat = Image.alpha_composite(Image.new("RGBA", image.size, PAPER), image).convert("RGB")
    return ImageOps.contain(flat, cell, Image.Resampling.LANCZOS)


def _flow(blocks: Sequence[Image.Image], width: int) -> Image.Image:
    """Sets blocks like words: side by side while they fit into `width`, then on the next line."""
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
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size=size)


def _drawable(text: str) -> str:
    """Keeps to what Pillow's built-in font holds: accents are dropped, other foreign characters become "?"."""
    plain = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    return "".join(c if c.isascii() or c in "…·“”’" else "?" for c in " ".join(plain.split()))


def _wrap(text: str, size: int, width: int, lines: int) -> list[str]:
    """Breaks text into at most `lines` lines of `width` pixels; what does not fit ends in an ellipsis."""

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
