"""Hooks of mkdocs: pages from the top folder and from a notebook, links that leave docs/."""

import json
import re
from pathlib import Path

from mkdocs.structure.files import File

TOP = Path(__file__).parent.parent
PAGES = ("CONTRIBUTING.md", "CHANGELOG.md")  # files of the top folder that the site has too
NOTEBOOK = "tutorial.ipynb"  # a page of its own; the file is there to download


def page_of(notebook):
    """Return the cells of a notebook as Markdown: prose, code, and what it printed."""
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        magic, _, rest = source.partition("\n")
        kind = {"%%bash": "bash", "%%writefile": "yaml"}.get(magic.split(" ")[0])
        # a command without the word that only notebooks know; a file with its name
        shown = rest if kind == "bash" else source
        printed = "".join("".join(output["text"]) for output in cell["outputs"])
        parts.append(f"```{kind or 'python'}\n{shown}\n```")
        parts += [f"```text\n{printed.strip(chr(10))}\n```"] if printed.strip() else []
    return "\n\n".join(parts) + f"\n\nThis page is a notebook: [{NOTEBOOK}]({NOTEBOOK}).\n"


def on_files(files, config):
    """Add the notebook, and the pages of the top folder; their links stay within the site."""
    for name in PAGES:
        text = (TOP / name).read_text(encoding="utf-8").replace("](docs/", "](")
        files.append(File.generated(config, name, content=text))
    notebook = json.loads((TOP / "docs" / NOTEBOOK).read_text(encoding="utf-8"))
    files.append(File.generated(config, "tutorial.md", content=page_of(notebook)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Rewrite links to files outside docs/, and what Markdown's dialects read differently.

    A file that the site does not have is code without a link.
    """
    depth = page.file.src_uri.count("/")
    if page.file.src_uri != "tutorial.md":
        markdown = markdown.replace(f"]({NOTEBOOK})", "](tutorial.md)")

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
