"""One HTML file that tells what a run did: no request leaves it, and it reads well without JavaScript."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from string import Template

from PIL import Image

from shielded.files import replacing
from shielded.generation import GUIDANCE_OPTIONS
from shielded.runs.report.plots import distance_plot, known, trace_plot
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
    """Write the page as one file; an older file stays as it is until the new one is complete.

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
    template = Template(files(__name__.rpartition(".")[0]).joinpath("page.html").read_text(encoding="utf-8"))
    with replacing(path) as draft:
        draft.write_text(template.substitute(title=escape(title), body="\n".join(body)), encoding="utf-8")


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
    if any(known(row.distance_without) or known(row.distance_with) for row in rows):
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
    active = [row["active"] for row in trace if known(row.get("active"))]
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
    ratio = f"{distance / radius:.3f}" if known(distance) and radius else "–"
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


_READ = {"protected": "ProtectedSet", "calibration": "Calibration"}  # settings that are files -> class that reads them
_CALL = {"steps": "num_inference_steps", **{name: name for name in GUIDANCE_OPTIONS}}


def _repeated(prompts: Sequence[str]) -> str:
    """Write a list of prompts as Python: ['owl'] * 4 + ['cat'] * 4."""
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
