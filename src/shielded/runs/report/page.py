"""One HTML file that tells what a run did: no request leaves it, and it reads well without JavaScript."""

import base64
import io
import math
import os
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from html import escape
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from string import Template

from PIL import Image

from shielded.runs.report.rows import Diversity, Picture, Row, by_prompt, number

LARGEST = 512  # pixels: larger pictures are embedded at this size, so that the page stays a few megabytes


def write_report(
    path: str | Path,
    report: Mapping,
    rows: Sequence[Row],
    diversity: Diversity | None,
    trace: Sequence[Mapping],
    settings: Mapping[str, object],
    made_with: Mapping[str, object] | None = None,
    title: str = "Images with and without SPELL",
) -> None:
    """Writes the page as one file; an older file stays as it is until the new one is complete.

    Args:
        path: file to write.
        report: the content of `report.json`; missing and None values are shown as not measured or left out.
        rows: images with and without SPELL; may be empty.
        diversity: one batch without and with SPELL, or None.
        trace: `Spell.trace`; may be empty.
        settings: keyword arguments of `Spell`; `protected` and `calibration` are paths.
        made_with: model, steps and guidance, as certificates have them; None: not known.
        title: heading of the page.

    Raises:
        TypeError: a setting is not plain data.
    """
    sections = [
        ("pictures", "Pictures", _pictures(report, rows)),
        ("distances", "Distances", _distances(report, rows)),
        ("diversity", "Diversity", _diversity(diversity)),
        ("sampling", "While sampling", _sampling(trace)),
        ("guarantee", "What is guaranteed", _guarantee(report)),
        ("refused", "Refused", _refused(report.get("refused"))),
        ("certificates", "Certificates", _certificates(report)),
        ("settings", "Settings", _settings(report, rows, settings, made_with or {})),
    ]
    sections = [(name, heading, content) for name, heading, content in sections if content]
    links = "".join(f'<li><a href="#{name}">{heading}</a></li>\n' for name, heading, _ in sections)
    body = [
        f"<header>\n<h1>{escape(title)}</h1>\n{_summary(report)}\n{_facts(report)}",
        f'<nav aria-label="Sections">\n<ul>\n{links}</ul>\n</nav>\n</header>\n<main>',
        *(
            f'<section id="{name}" aria-labelledby="{name}-title">\n'
            f'<h2 id="{name}-title">{heading}</h2>\n{content}\n</section>'
            for name, heading, content in sections
        ),
        "</main>",
    ]
    template = Template(files(__package__).joinpath("page.html").read_text(encoding="utf-8"))
    _write(Path(path), template.substitute(title=escape(title), body="\n".join(body)))


def distance_plot(rows: Sequence[Row], radius: float | None) -> str:
    """Draws one line per image: its distance to the nearest protected image, without (hollow) and with SPELL (filled).

    Args:
        rows: rows without any distance are left out.
        radius: marked on every line, with the inside shaded; None: not shown.

    Returns:
        An inline SVG that takes the width of its container, styled by the page; "" if there is no distance to show.
    """
    rows = [row for row in rows if _known(row.distance_without) or _known(row.distance_with)]
    if not rows:
        return ""
    known = [d for row in rows for d in (row.distance_without, row.distance_with, radius) if _known(d)]
    top = _round_up(max(known))

    def x(distance: float) -> float:
        return 100 * distance / top

    marks, y = [], 26
    for prompt, group in by_prompt(rows).items():
        marks.append(f'<text class="strong" x="0" dx="8" y="{y + 20}">{escape(_shorten(prompt, 38))}</text>')
        y += 32
        for row in group:
            if _known(radius):  # a tick per image: a line all the way down would run through the numbers
                marks.append(_radius_tick(x(radius), y + 18))
            marks.append(_dumbbell(row, x, y))
            y += 42
    zone = ""
    if _known(radius):
        edge = x(radius)
        side = 'text-anchor="end" dx="-6"' if edge > 60 else 'dx="6"'
        zone = (
            f'<rect class="zone" x="0" y="20" width="{edge:.2f}%" height="{y - 20}"/>\n{_radius_tick(edge, 4)}\n'
            f'<text class="strong" x="{edge:.2f}%" y="14" {side}>radius {number(radius)}</text>\n'
        )
    ticks = [(0, "start"), (top / 2, "middle"), (top, "end")]
    axis = f'<line class="rule" x1="0" x2="100%" y1="{y}" y2="{y}"/>\n' + "\n".join(
        f'<text x="{x(value):.2f}%" y="{y + 18}" text-anchor="{anchor}">{value:g}</text>' for value, anchor in ticks
    )
    label = f"Distance of {len(rows)} images to their nearest protected image, without and with SPELL"
    return f'<svg role="img" aria-label="{label}" height="{y + 26}">\n{zone}{axis}\n' + "\n".join(marks) + "\n</svg>"


def trace_plot(trace: Sequence[Mapping]) -> str:
    """Draws how many shields were active and how hard they pushed, over the noise schedule from 1 to 0.

    Args:
        trace: one row per step and image with the keys `noise_level` (1 at the start, 0 at the end), `active`,
            `push` and `score_ratio`. Lines are means over the images, bands go from the least to the most.

    Returns:
        An inline SVG that takes the width of its container, styled by the page; "" if there is nothing to show.
    """
    quantities = [
        ("active", "Active shields per image"),
        ("push", "Length of the push (latent L2)"),
        ("score_ratio", "Push as a share of the model's score"),
    ]
    panels = [(label, points) for key, label in quantities if (points := _aggregate(trace, key))]
    if not panels:
        return ""
    marks = [_panel(label, points, 166 * i) for i, (label, points) in enumerate(panels)]
    y = 166 * len(panels)
    for level, anchor, text in (1, "start", "1 (pure noise)"), (0.5, "middle", "0.5"), (0, "end", "0 (finished)"):
        marks.append(f'<text x="{100 * (1 - level):g}%" y="{y}" text-anchor="{anchor}">{text}</text>')
    label = "Over the noise schedule: " + ", ".join(label for label, _ in panels)
    return f'<svg role="img" aria-label="{label}" height="{y + 6}">\n' + "\n".join(marks) + "\n</svg>"


# ----------------------------------------------------------------------------------------------------------------
# Parts of the page, in reading order. Each returns "" when it has nothing to say.


def _summary(report: Mapping) -> str:
    n, radius, prompt = report.get("n"), report.get("radius"), report.get("prompt")
    before, after = report.get("leaks_without"), report.get("leaks_with")
    subject = ("The images" if n is None else _count(n, "image")) + (f" of “{escape(prompt)}”" if prompt else "")
    verb, seeds = ("was", "seed") if n == 1 else ("were", "seeds")
    lead = f"{subject} {verb} generated twice from the same {seeds}: by the model alone, and with SPELL."
    pairs = report.get("min_pair_distance_without"), report.get("min_pair_distance_with")
    if None not in pairs:
        lead += (
            f" SPELL pushes images apart that are closer than {number(radius)} to each other: the two that are most "
            f"alike were {number(pairs[0])} apart without it and {number(pairs[1])} with it."
        )
    if before is not None and after is not None:
        reach = "their radius" if radius is None else f"the radius of {number(radius)}"
        lead += f" Closer to a protected image than {reach}: {before} without SPELL, {after} with it."
    refused = len(report.get("refused") or ())
    if refused:
        verb, object_ = ("was", "it lies") if refused == 1 else ("were", "they lie")
        lead += f" {_count(refused, 'image')} {verb} refused and not written, because {object_} inside a shield."
    text = f'<p class="lead">{lead}</p>'
    if after:
        text += (
            '\n<div class="note warning">\n<p><strong>The distance was not kept everywhere.</strong> '
            f"{_count(after, 'image')} with SPELL still {'lies' if after == 1 else 'lie'} inside a shield. "
            "The certificates below say which; do not rely on the distance there.</p>\n</div>"
        )
    return text


def _facts(report: Mapping) -> str:
    n, radius = report.get("n"), report.get("radius")
    reach = "smallest distance" if radius is None else f"radius {number(radius)}"
    facts = [
        ("leaks", "Images inside a shield", str, "" if n is None else f"of {n}"),
        ("min_distance", "Nearest protected image", number, reach),
        ("min_decoded_distance", "The same, pictures encoded again", number, reach),
        ("min_pair_distance", "The two images that are most alike", number, f"apart; radius {number(radius)}"),
        ("vendi", "Vendi score", number, "effective number of images"),
        ("seconds", "Time", lambda seconds: f"{seconds:.1f} s", "" if n is None else f"for {_count(n, 'image')}"),
    ]
    cells = []
    for key, label, write, note in facts:
        values = report.get(f"{key}_without"), report.get(f"{key}_with")
        if values == (None, None):
            continue
        before, after = ('<span class="none">not measured</span>' if v is None else write(v) for v in values)
        cells.append(
            f"<div><dt>{label}</dt>"
            f'<dd><span class="hidden">without SPELL </span><span class="without">{before}</span> '
            '<span aria-hidden="true">→</span> <span class="hidden">, with SPELL </span>'
            f'<span class="with">{after}</span><small>{note}</small></dd></div>'
        )
    if not cells:
        return ""
    text = 'Each pair reads <span class="without">without SPELL</span> → <span class="with">with SPELL</span>.'
    if _guarantee(report):
        text += (
            " Distances are L2 distances in the model's latent space, "
            '<a href="#guarantee">which is not the same as resemblance</a>.'
        )
    cells = "\n".join(cells)
    return f'<dl class="facts">\n{cells}\n</dl>\n<p class="muted">{text}</p>'


def _guarantee(report: Mapping) -> str:
    if report.get("leaks_with") is None and not report.get("certificates"):
        return ""
    return (
        '<div class="note">\n<p>An image certified as outside is at least one radius away from every protected image. '
        "The distance is the L2 distance in the model's latent space, measured exactly, on the sampler's finished "
        "latents and on the picture encoded again, which lies in a slightly other place. "
        "<code>shielded verify</code> measures files again and checks their certificates.</p>\n"
        "<p><strong>That is not a promise of no resemblance.</strong> Two pictures that are far apart in this sense "
        "can still show the same subject, style or person, and a copy that is shifted, mirrored or recoloured may "
        "be far from its original. Look at the pictures, too.</p>\n</div>"
    )


def _pictures(report: Mapping, rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    radius = report.get("radius")
    text = "<p>Same prompt, same seed: the upper picture is the model's own, the lower one is made with SPELL."
    if any(_known(row.distance_without) or _known(row.distance_with) for row in rows):
        text += " The number is the distance to the nearest protected image"
        text += "." if radius is None else f"; below {number(radius)} it lies inside a shield."
    parts = [text + "</p>"]
    for prompt, group in by_prompt(rows).items():
        cards = [_card(prompt, row.seed, row.pictures) for row in group]
        parts.append(f"<h3>{escape(prompt)}</h3>\n{_cards(cards, group[0].without)}")
    return "\n".join(parts)


def _distances(report: Mapping, rows: Sequence[Row]) -> str:
    plot = distance_plot(rows, report.get("radius"))
    if not plot:
        return ""
    zone = "" if report.get("radius") is None else " Shaded: inside a shield."
    return (
        "<p>How far each image is from its nearest protected image. SPELL pushes what comes too close out to the "
        "radius or a little beyond.</p>\n"
        f'<figure class="plot">\n{plot}\n<figcaption>L2 distance in the latent space. '
        '<span class="without">Hollow: without SPELL.</span> <span class="with">Filled: with SPELL.</span>'
        f"{zone}</figcaption>\n</figure>"
    )


def _diversity(diversity: Diversity | None) -> str:
    if diversity is None:
        return ""
    d = diversity
    text = (
        f"<p>One batch of {_count(len(d.seeds), 'image')}. With SPELL the images of a batch push each other away while "
        f"they are closer than {number(d.radius)}. The Vendi score, the effective number of different images, is "
        f'<strong class="without">{number(d.vendi_without)}</strong> without SPELL and '
        f'<strong class="with">{number(d.vendi_with)}</strong> with it: 1 would mean all the same, {len(d.seeds)} all '
        "entirely different.</p>"
    )
    cards = [
        _card(d.prompt, seed, [Picture("without SPELL", before), Picture("with SPELL", after)])
        for seed, before, after in zip(d.seeds, d.without, d.with_, strict=True)
    ]
    return f"{text}\n<h3>{escape(d.prompt)}</h3>\n{_cards(cards, d.without[0])}"


def _sampling(trace: Sequence[Mapping]) -> str:
    plot = trace_plot(trace)
    if not plot:
        return ""
    active = [row["active"] for row in trace if _known(row.get("active"))]
    text = (
        "At every step the model predicts the finished image. Where that prediction lies inside a shield, SPELL pushes "
        "it out of it; where it does not, SPELL changes nothing."
    )
    if active and not any(active):
        text += " In this run no shield was ever active."
    elif active:
        share = sum(a > 0 for a in active) / len(active)
        text += f" In this run a shield was active in {share:.0%} of all predictions."
    return (
        f'<p>{text}</p>\n<figure class="plot">\n{plot}\n<figcaption>From left to right: the share of the noise '
        "schedule that is left. Lines are means over the images, bands go from the least to the most."
        "</figcaption>\n</figure>"
    )


def _refused(refused: Sequence[Mapping] | None) -> str:
    if not refused:
        return ""
    items = "\n".join(
        f"<li>{_text(entry.get('prompt'))}, seed {_text(entry.get('seed'))}: {_text(entry.get('reason'))}</li>"
        for entry in refused
    )
    return (
        "<p>These images lie inside a shield after all attempts. They are listed here and were not written.</p>\n"
        f"<ul>\n{items}\n</ul>"
    )


def _certificates(report: Mapping) -> str:
    certificates = report.get("certificates")
    if not certificates:
        return ""
    numeric = ["Distance", "Encoded again", "Radius", "Distance / radius", "Attempts"]
    heads = ["Image", "Result", *numeric, "Repair", "Nearest protected", "SHA-256"]
    head = "".join(f'<th scope="col"{" class=num" if h in numeric else ""}>{h}</th>' for h in heads)
    body = "\n".join(_certificate(c) for c in certificates)
    repairs = [
        f"{_count(report[key], 'image')} {what}"
        for key, what in (("restarted", "left a shield by sampling again"), ("pushed", "by a push at the end"))
        if report.get(key)
    ]
    return (
        f"<p>One line per image, measured when it was finished. {_protected_sets(certificates)} The full "
        "SHA-256 of each image file is in <code>report.json</code>."
        f"{' ' + ', '.join(repairs) + '.' if repairs else ''}</p>\n"
        '<div class="scroll" role="region" aria-labelledby="certificates-title" tabindex="0">\n<table>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>\n</div>"
    )


def _settings(
    report: Mapping, rows: Sequence[Row], settings: Mapping[str, object], made_with: Mapping[str, object]
) -> str:
    if not settings:
        return ""
    names = [name for key, name in _READ.items() if settings.get(key) is not None]
    imports = [f"from shielded import {', '.join(sorted([*names, 'Spell']))}"]
    call = [repr(report.get("prompt") or "a prompt")]
    if report.get("n") is not None:
        call.append(f"num_images_per_prompt={report['n']}")
    before = ""
    if rows:  # the same images again
        imports.insert(0, "import torch")
        before = f"prompts = {_repeated([row.prompt for row in rows])}\nseeds = {_run([row.seed for row in rows])}\n"
        before += "generators = [torch.Generator().manual_seed(seed) for seed in seeds]\n"
        call = ["prompts", "generator=generators"]
    call += [f"{name}={made_with[key]!r}" for key, name in _CALL.items() if key in made_with]
    if "model" in made_with:
        imports.append("from shielded.models import load")
        before = f"pipe = load({made_with['model']!r})\n{before}"
    arguments = "\n".join(f"    {name}={_literal(name, value)}," for name, value in settings.items())
    code = "\n".join(imports) + (
        f"\n\n{before}spell = Spell(\n{arguments}\n)\n"
        f"with spell.attach(pipe):\n    images = pipe({', '.join(call)}).images\n"
    )
    return (
        "<p>The same settings in Python, before anything is repaired; <code>pipe</code> may be any diffusers pipeline. "
        "The radius belongs to this model's latent space: choose it anew for another model.</p>\n"
        '<pre tabindex="0" role="region" aria-label="Settings as Python code">'
        f'<code id="code">{escape(code)}</code></pre>\n'
        '<button type="button" id="copy" aria-live="polite" hidden>Copy settings</button>'
    )


# ----------------------------------------------------------------------------------------------------------------
# Pieces.


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}{'' if n == 1 else 's'}"


def _card(prompt: str, seed: int, pictures: Sequence[Picture]) -> str:
    figures = []
    for p in pictures:
        img = "" if p.image is None else _img(p.image, f"{prompt}, seed {seed}, {p.label}", p.inside)
        figures.append(f"<figure>{img}<figcaption><b>{p.label}</b>{p.caption}</figcaption></figure>")
    return f"<li>\n<h4>seed {seed}</h4>\n" + "\n".join(figures) + "\n</li>"


def _cards(cards: Sequence[str], example: Image.Image) -> str:
    # Few or large pictures get more room; eight small ones fit next to each other on a wide screen.
    cell = 208 if len(cards) <= 4 or max(example.size) > 128 else 120
    return f'<ul class="pairs" style="--cell: {cell}px">\n' + "\n".join(cards) + "\n</ul>"


def _img(image: Image.Image, alt: str, inside: bool) -> str:
    image = image.convert("RGBA" if image.mode in ("RGBA", "LA", "P", "PA") else "RGB")
    image.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", lossless=max(image.size) <= 128, quality=90)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return (
        f'<img{" class=is-inside" if inside else ""} alt="{escape(alt)}" width="{image.width}" height="{image.height}" '
        f'src="data:image/webp;base64,{data}">'
    )


def _certificate(c: Mapping) -> str:
    distance, radius, inside = c.get("nearest_distance"), c.get("radius"), c.get("inside")
    lengths = distance, c.get("decoded_distance"), radius
    result = "not measured"
    if inside is not None:
        result = '<strong class="without">inside</strong>' if inside else "outside"
    ratio = f"{distance / radius:.3f}" if _known(distance) and radius else "–"
    sha = c.get("sha256")
    cells = [
        f'<th scope="row">{_text(c.get("image"))}</th>',
        f"<td>{result}</td>",
        *(f"<td class=num>{'–' if length is None else number(length)}</td>" for length in lengths),
        f"<td class=num>{ratio}</td>",
        f"<td class=num>{_text(c.get('attempts'))}</td>",
        f"<td>{_text(c.get('repair'))}</td>",
        f"<td>{_text(c.get('nearest_id'))}</td>",
        f"<td><code>{escape(sha[:12])}…</code></td>" if sha else "<td>–</td>",
    ]
    return f"<tr>{''.join(cells)}</tr>"


def _protected_sets(certificates: Sequence[Mapping]) -> str:
    sets = dict.fromkeys((c.get("protected_set"), c.get("protected_version")) for c in certificates)
    names = [
        f"<code>{escape(str(name))}</code>" + ("" if version is None else f", version {escape(str(version))}")
        for name, version in sets
        if name is not None
    ]
    return f"Protected set: {'; '.join(names)}." if names else ""


def _text(value: object) -> str:
    return "–" if value is None else escape(str(value))


_READ = {"protected": "ProtectedSet", "calibration": "Calibration"}  # settings that are files, and what reads them
_CALL = {"steps": "num_inference_steps", "guidance_scale": "guidance_scale", "true_cfg_scale": "true_cfg_scale"}


def _repeated(prompts: Sequence[str]) -> str:
    """A list of prompts as Python: ['owl'] * 4 + ['cat'] * 4."""
    return " + ".join(f"[{prompt!r}] * {len(list(same))}" for prompt, same in groupby(prompts))


def _run(seeds: Sequence[int]) -> str:
    one_by_one = range(seeds[0], seeds[0] + len(seeds))
    return repr(one_by_one) if list(seeds) == list(one_by_one) else repr(list(seeds))


def _literal(name: str, value: object) -> str:
    if name in _READ and isinstance(value, str | Path):
        return f"{_READ[name]}.{'open' if name == 'protected' else 'load'}({str(value)!r})"
    if value is None or isinstance(value, bool | int | float | str | tuple | list):
        return repr(value)
    raise TypeError(
        f"the setting {name} is a {type(value).__name__}, which cannot be written as Python: "
        "give numbers, text or tuples, and for protected the path of the set"
    )


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


# ----------------------------------------------------------------------------------------------------------------
# Plots. Positions across are percentages and text has its natural size, so a plot fits a phone and a wide screen.


def _known(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _round_up(value: float) -> float:
    """The end of an axis: the next 1, 2, 2.5, 4, 5 or 8 times a power of ten."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 2.5, 4, 5, 8, 10) if step * power >= value)


def _shorten(text: str, columns: int) -> str:
    """Cuts text to a number of columns, East Asian wide characters counting two; a cut ends in an ellipsis."""
    text = " ".join(text.split())
    used = 0
    for i, character in enumerate(text):
        used += 2 if unicodedata.east_asian_width(character) in "WF" else 1
        if used > columns:
            return text[:i].rstrip() + "…"
    return text


def _radius_tick(x: float, y: float) -> str:
    return f'<line class="radius" x1="{x:.2f}%" x2="{x:.2f}%" y1="{y}" y2="{y + 16}"/>'


def _dumbbell(row: Row, x: Callable[[float], float], y: float) -> str:
    before, after = row.distance_without, row.distance_with
    values = f"{number(before)} → {number(after)}"
    marks = [
        f'<text x="0" dx="8" y="{y + 13}">seed {row.seed}</text>',
        f'<text x="100%" y="{y + 13}" text-anchor="end">{values}</text>',
        f'<line class="rule" x1="0" x2="100%" y1="{y + 26}" y2="{y + 26}"/>',
    ]
    if _known(before) and _known(after):
        marks.append(f'<line class="link" x1="{x(before):.2f}%" x2="{x(after):.2f}%" y1="{y + 26}" y2="{y + 26}"/>')
    if _known(before):
        marks.append(f'<circle class="before" cx="{x(before):.2f}%" cy="{y + 26}" r="6"/>')
    if _known(after):
        marks.append(f'<circle class="after" cx="{x(after):.2f}%" cy="{y + 26}" r="4.5"/>')
    return "\n".join(marks)


def _aggregate(trace: Sequence[Mapping], key: str) -> list[tuple[float, float, float, float]]:
    """Per noise level, from 1 to 0: (level, mean, least, most) over the images."""
    levels: dict[float, list[float]] = {}
    for row in trace:
        if _known(row.get(key)):
            levels.setdefault(row["noise_level"], []).append(float(row[key]))
    return [(level, sum(v) / len(v), min(v), max(v)) for level, v in sorted(levels.items(), reverse=True)]


def _panel(label: str, points: Sequence[tuple[float, float, float, float]], y: float) -> str:
    top = _round_up(max(most for *_, most in points))

    def at(level: float, value: float) -> str:
        return f"{100 * (1 - level):.2f},{100 * (1 - value / top):.2f}"

    band = [at(level, most) for level, _, _, most in points] + [at(level, least) for level, _, least, _ in points[::-1]]
    mean = [at(level, mean) for level, mean, _, _ in points]
    marks = [f'<text class="strong" x="0" y="{y + 14}">{escape(label)}</text>']
    for share in (0, 0.5, 1):  # the numbers stand at the right, where the noise is gone and the lines run low
        height = y + 26 + 110 * (1 - share)
        marks.append(f'<line class="rule" x1="0" x2="100%" y1="{height:g}" y2="{height:g}"/>')
        if share:
            marks.append(f'<text x="100%" y="{height - 4:g}" text-anchor="end">{top * share:g}</text>')
    marks.append(
        f'<svg x="0" y="{y + 26}" width="100%" height="110" viewBox="0 0 100 100" preserveAspectRatio="none">'
        f'<polygon class="band" points="{" ".join(band)}"/>'
        f'<polyline class="mean" vector-effect="non-scaling-stroke" points="{" ".join(mean)}"/></svg>'
    )
    marks += [
        f'<circle class="after" cx="{100 * (1 - level):.2f}%" cy="{y + 26 + 110 * (1 - mean / top):.2f}" r="2.5"/>'
        for level, mean, _, _ in points
    ]
    return "\n".join(marks)
