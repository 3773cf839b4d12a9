"""For mkdocs: pages link to files beside docs/, such as the examples, and the site carries these along."""

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"\]\(\.\./([^)#\s]+)")


def on_files(files, config):
    found = {target for page in files.documentation_pages() for target in LINK.findall(page.content_string)}
    for target in sorted(found | {str(path.relative_to(ROOT)) for path in ROOT.glob("examples/*.py")}):
        files.append(File.generated(config, _page(target), content=_content(ROOT / target)))
    return files


def on_page_markdown(markdown, page, **_):
    return LINK.sub(lambda link: "](" + _page(link[1]), markdown)


def _page(target):
    return "files/" + re.sub(r"\.py$", ".md", target)


def _content(path):
    text = path.read_text()
    if path.suffix != ".py":
        return re.sub(r"\]\((\w+)\.py\)", r"](\1.md)", text)
    return f"# {path.name}\n\n````python\n{text}````\n"
