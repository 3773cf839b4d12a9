"""README and documentation: every block runs, every link leads somewhere, every command that is named exists."""

import ast
import functools
import re
import shlex
import textwrap
from pathlib import Path

import diffusers
import pytest
import typer
from PIL import Image, ImageDraw
from typer.testing import CliRunner

from shielded.cli import app
from shielded.radius import calibrate

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
FENCE = re.compile(r"^```(\S*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SHOWN = {"text", "bibtex", "json", "toml", "html"}  # languages of blocks that are not run
STEPS = 2  # of every sampler here, whatever a page says
COMMANDS = typer.main.get_command(app).commands


def blocks(page):
    """(language, text, line) of each fenced block."""
    text = page.read_text()
    return [(m[1], m[2], text[: m.start()].count("\n") + 2) for m in FENCE.finditer(text)]


def prose(page):
    """The text without its fenced blocks."""
    return FENCE.sub("", page.read_text())


def name(page):
    return str(page.relative_to(ROOT))


# What runs ----------------------------------------------------------------------------------------------------------

RUN = [page for page in PAGES if {"python", "bash"} & {language for language, *_ in blocks(page)}]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder but for a few pictures in photos/, and pipelines that take few steps."""
    (tmp_path / "photos").mkdir()
    for i, color in enumerate(["firebrick", "seagreen", "royalblue", "goldenrod", "black", "hotpink"]):
        picture = Image.new("RGB", (160, 128), "white")
        ImageDraw.Draw(picture).regular_polygon((80, 64, 30 + 5 * i), 3 + i, rotation=7 * i, fill=color)
        picture.save(tmp_path / "photos" / f"photo-{i}.png")
    for kind in (diffusers.StableDiffusionPipeline, diffusers.StableDiffusionImg2ImgPipeline):
        monkeypatch.setattr(kind, "__call__", few_steps(kind.__call__))
    monkeypatch.setattr(calibrate, "PROMPTS", 2)
    monkeypatch.chdir(tmp_path)


def few_steps(call):
    @functools.wraps(call)
    def limited(self, *args, **options):
        return call(self, *args, **{**options, "num_inference_steps": STEPS})

    return limited


def run_bash(text):
    """The lines of a bash block; `# exit code N` after one that is to fail."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if not words or words[0] == "make":  # its targets are checked below; one of them runs this test
            continue
        assert words[0] == "shielded", f"{line}: only `shielded` and `make` run here; fence other commands as text"
        result = CliRunner().invoke(app, words[1:])
        expected = re.search(r"# exit code (\d)", line)
        assert result.exit_code == int(expected[1] if expected else 0), f"{line}\n{result.output}"


@pytest.mark.parametrize("page", RUN, ids=name)
def test_blocks_run(page, folder):
    namespace = {"__name__": "__main__"}
    for language, text, line in blocks(page):
        if language == "python":
            exec(compile("\n" * (line - 1) + text, str(page), "exec"), namespace)
        elif language == "bash":
            run_bash(text)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_block_has_a_language_that_is_run_or_shown(page):
    assert page.read_text().count("\n```") % 2 == 0
    assert {language for language, *_ in blocks(page)} <= {"python", "bash"} | SHOWN


# What is named ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_and_their_options_exist(page):
    text = page.read_text()
    code = [*re.findall(r"`([^`\n]+)`", prose(page)), *"\n".join(t for _, t, _ in blocks(page)).splitlines()]
    for line in (c.split("#")[0] for c in code):
        for command, rest in re.findall(r"(?<!from )(?<!import )\bshielded ([a-z]+)\b([^|;]*)", line):
            assert command in COMMANDS, f"there is no command in: {line}"
            known = {
                option for parameter in COMMANDS[command].params for option in parameter.opts + parameter.secondary_opts
            }
            assert set(re.findall(r"(?<=\s)--?[a-z][a-z-]*", rest)) <= known | {"--help", "--help-all"}, line
        for target in re.findall(r"^\s*make ([a-z]+)", line):
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), line
        for script, rest in re.findall(r"(?:python|launch) (?:\S+=\S+ )*([\w/]+\.py)([^|;]*)", line):
            source = (ROOT / script).read_text()
            assert all(f'"{option}"' in source for option in re.findall(r"--[a-z][a-z-]*", rest)), line
        for path in re.findall(r"(?<![\w/.])(?:src|tests|docs|benchmarks|examples|training)/[\w/]+\.\w+", line):
            assert (ROOT / path).exists(), line
    assert not re.search(r"[^\w]/(?:work|home|root|tmp)/", text)


def test_stations_of_the_architecture_are_in_the_code():
    walks = re.split(r"^## ", (ROOT / "docs/architecture.md").read_text(), flags=re.MULTILINE)[2:]
    assert len(walks) == 2
    for walk in walks:
        stations = re.findall(r"^\| (\d+) \| `([\w/]+\.py)` \| `([\w.]+)` \|", walk, re.MULTILINE)
        assert [int(number) for number, *_ in stations] == [*range(1, len(stations) + 1)]
        assert 1 < len(stations) <= 10
        for _, file, function in stations:
            tree = ast.parse((ROOT / "src/shielded" / file).read_text())
            for part in function.split("."):
                found = [node for node in tree.body if getattr(node, "name", None) == part]
                assert found, f"{file} has no {function}"
                tree = found[0]


def test_pages_of_jobs_are_short():
    """Two screens each, of 50 lines of 100 columns: the jobs are what the site lists first."""
    jobs = re.search(r"- Jobs:\n((?: {6}- .*\n)+)", (ROOT / "mkdocs.yml").read_text())
    for file in ["tutorial.md", *re.findall(r": (\S+\.md)$", jobs[1], re.MULTILINE)]:
        lines = (ROOT / "docs" / file).read_text().splitlines()
        shown = sum(len(textwrap.wrap(line, 100)) or 1 for line in lines)
        assert shown <= 100, f"{file} has {shown} lines"


def anchors(page):
    """The anchors of a page's headings, as GitHub and the site make them."""
    titles = re.findall(r"^#+ (.+?)\s*$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "examples/README.md"], ids=name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_file(), f"{link} leads nowhere"
        assert not anchor or anchor in anchors(target), f"there is no heading for {link}"


def test_every_page_is_in_the_navigation_once():
    listed = re.findall(r": (\w[\w-]*\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(page.name for page in PAGES if page.parent.name == "docs")


def test_every_picture_is_used():
    used = {Path(link).name for page in PAGES for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text())}
    assert {path.name for path in (ROOT / "docs/images").iterdir()} <= used


def test_the_site_asks_no_other_host(tmp_path):
    mkdocs = pytest.importorskip("mkdocs.commands.build")
    from mkdocs.config import load_config

    mkdocs.build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path)))
    for page in tmp_path.rglob("*.html"):
        fetched = re.findall(r"<(?:script|img|iframe)[^>]+src=\"?(\S+)|<link[^>]+href=\"?(\S+)", page.read_text())
        assert not [url for pair in fetched for url in pair if url.startswith(("http", "//"))], page
