"""Hooks of mkdocs: pages from the top folder, and links that leave docs/."""

import re
from pathlib import Path

from mkdocs.structure.files import File

TOP = Path(__file__).parent.parent
PAGES = ("CONTRIBUTING.md", "CHANGELOG.md")  # files of the top folder that the site has too


def on_files(files, config):
    """Add the pages of the top folder; their links to docs/ stay within the site."""
    for name in PAGES:
        text = (TOP / name).read_text(encoding="utf-8").replace("](docs/", "](")
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown, page, config, files):
    """Rewrite links to files outside docs/, and what Markdown's dialects read differently.

    A file that the site does not have is code without a link.
    """
    depth = page.file.src_uri.count("/")

    def rewritten(match):
        text, path = match.groups()
        if path.partition("#")[0] in PAGES:
            return f"[{text}]({'../' * depth}{path})"
        return text if "`" in text else f"`{text}`"

    leaving = r"\[([^\]]*)\]\(" + r"\.\./" * (depth + 1) + r"([^)\s]+)\)"
    markdown = re.sub(leaving, rewritten, markdown)
    markdown = markdown.replace(" ± ", "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}")  # stays on one line
    # GitHub reads "[a] [b]" as text and Python-Markdown as a reference; code stays as it is
    brackets = re.compile(r"^ {4}.*|`[^`]*`|\] (?=\[)", re.MULTILINE)
    return brackets.sub(lambda found: "] \\" if found[0] == "] " else found[0], markdown)
