"""The package metadata that `hatch_build.py` computes."""

import importlib.util
import re
from pathlib import Path

import pytest

import shielded

ROOT = Path(__file__).parents[1]


@pytest.fixture
def build():
    pytest.importorskip("hatchling")
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def metadata(build, monkeypatch):
    def metadata(repository):
        monkeypatch.setenv("REPOSITORY_URL", repository)
        hook = build.PublishedMetadata(str(ROOT), {})
        result = {"version": "1.2.3"}
        hook.update(result)
        return result

    return metadata


def test_readme_and_urls_without_an_address(metadata):
    result = metadata("")
    assert result["readme"]["text"] == (ROOT / "README.md").read_text()
    assert result["urls"] == {}


def test_links_of_a_package_page_are_absolute_and_lead_to_files(metadata):
    result = metadata("https://forge.example/some/shielded/")
    assert result["urls"]["Repository"] == "https://forge.example/some/shielded"
    before = re.findall(r"\]\(([^)]+)\)", (ROOT / "README.md").read_text())
    after = re.findall(r"\]\(([^)]+)\)", result["readme"]["text"])
    assert len(before) == len(after)
    assert all(link.startswith("https://") for link in after)
    prefix = r"https://forge.example/some/shielded/(?:raw|blob)/v1\.2\.3/"
    files = [re.sub(prefix, "", link).split("#")[0] for link in after if link.startswith("https://forge.example")]
    assert files
    assert all((ROOT / file).is_file() for file in files)
    assert "](https://forge.example/some/shielded/raw/v1.2.3/docs/images/overview.webp)" in result["readme"]["text"]


def test_the_citation_names_the_version_of_the_source():
    citation = (ROOT / "CITATION.cff").read_text()
    assert re.search(r"^version: (\S+)$", citation, re.MULTILINE)[1] == shielded.__version__
