"""Show a few pictures of each method beside its numbers, from the cells."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from typing import Any

from torch import Tensor

from shielded.evaluation.reproduce.study import PICTURE, Cell, Setting, Study

_PROMPTS = 3  # that a page shows


def picture_table(study: Study, rows: Sequence[dict[str, Any]], protected: Tensor | None = None) -> str:
    """Write an HTML table of pictures, a row per method and a column per prompt; "" if cells hold none.

    Args:
        study: whose cells are read.
        rows: of a result. Of the strengths of one method, the middle one is shown.
        protected: see `Study.cells`.
    """
    settings: dict[str, list[Setting]] = {}
    for row in rows:
        setting = Setting(row["label"], row["method"], row["strength"], row["options"])
        if setting not in settings.setdefault(setting.label, []):
            settings[setting.label].append(setting)
    prompts, lines = study.prompts[:_PROMPTS], []
    for label, found in settings.items():
        setting = found[len(found) // 2]
        cells = [_images(study.cell(setting, prompt, 0, protected), f"{prompt}, {label}") for prompt in prompts]
        if any(cells):
            strength = f" ({setting.strength:g})" if setting.strength else ""
            tds = "".join(f"<td>{images}</td>" for images in cells)
            lines.append(f'<tr><th scope="row">{escape(label)}{strength}</th>{tds}</tr>')
    if not lines:
        return ""
    head = "".join(f'<th scope="col">{escape(prompt)}</th>' for prompt in prompts)
    return (
        "<h2>Pictures</h2><p>The first images of the first prompts, of the same seeds in each row.</p>"
        f'<div class="pictures"><table><thead><tr><td></td>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _images(cell: Cell, alt: str) -> str:
    files = [cell[name] for name in sorted(cell) if name.startswith(PICTURE)]
    data = [base64.b64encode(file.numpy().tobytes()).decode("ascii") for file in files]
    return "".join(f'<img alt="{escape(alt)}" width="80" src="data:image/webp;base64,{each}">' for each in data)
