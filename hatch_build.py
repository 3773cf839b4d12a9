"""Package metadata that depends on where the repository is published.

A package page cannot show the relative links and pictures of README.md. A release sets `REPOSITORY_URL`, as
`.github/workflows/release.yml` does, and gets absolute links and project URLs. Any other build keeps the README.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

_RELATIVE_LINK = re.compile(r"(!?)\[([^\]]*)\]\((?![a-z]+:|#)([^)\s]+)\)")


class PublishedMetadata(MetadataHookInterface):
    """Fill in `readme` and `urls`."""

    def update(self, metadata: dict[str, Any]) -> None:
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        repository = os.environ.get("REPOSITORY_URL", "").rstrip("/")
        metadata["urls"] = project_urls(repository)
        if repository:
            text = with_absolute_links(text, repository, f"v{metadata['version']}")
        metadata["readme"] = {"content-type": "text/markdown", "text": text}


def project_urls(repository: str) -> dict[str, str]:
    """Name the repository's pages; none while its address is unknown."""
    if not repository:
        return {}
    return {
        "Repository": repository,
        "Issues": f"{repository}/issues",
        "Changelog": f"{repository}/blob/main/CHANGELOG.md",
    }


def with_absolute_links(text: str, repository: str, tag: str) -> str:
    """Point relative links of a Markdown text at the files of a tag, and pictures at their raw bytes."""
    return _RELATIVE_LINK.sub(
        lambda link: f"{link[1]}[{link[2]}]({repository}/{'raw' if link[1] else 'blob'}/{tag}/{link[3]})", text
    )
