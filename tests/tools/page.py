"""The Markdown pages of the repository, and their generated sections."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def replace_section(page: Path, name: str, text: str) -> None:
    """Write `text` between `<!-- begin <name> -->` and `<!-- end <name> -->`.

    Raises:
        ValueError: the page has no such section.
    """
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    before = page.read_text()
    if begin not in before or end not in before:
        raise ValueError(f"{page} has no section between {begin} and {end}")
    section = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    page.write_text(section.sub(lambda _: f"{begin}\n{text}\n{end}", before))
