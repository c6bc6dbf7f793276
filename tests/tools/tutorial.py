"""Run docs/tutorial.ipynb again and store its outputs: `python tests/tools/tutorial.py`.

Outputs are stored without what one machine alone has: the temporary folder, and what libraries
write to the standard error.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from pathlib import Path

NOTEBOOK = Path(__file__).parents[2] / "docs" / "tutorial.ipynb"
COLOUR = re.compile(r"\x1b\[[\d;]*m")


def cleaned(text: str, root: str) -> str:
    """An output without folders below `root`, colours, and spaces at the end of lines."""
    shown = re.sub(rf"{re.escape(root)}/tmp\w+", "...", COLOUR.sub("", text))
    return "".join(f"{line.rstrip()}\n" for line in shown.splitlines())


def execute(notebook: Path) -> None:
    """Run a notebook in a temporary folder and with an empty cache; store it with its outputs."""
    import nbformat
    from nbclient import NotebookClient

    book = nbformat.read(notebook, as_version=4)
    with tempfile.TemporaryDirectory() as root:
        os.environ |= {"TMPDIR": root, "FLARE_EXP_CACHE": f"{root}/cache", "OMP_NUM_THREADS": "1"}
        client = NotebookClient(book, timeout=1200, record_timing=False, coalesce_streams=True)
        client.execute(cwd=root)
    for cell in book.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") == "stdout"]
            for output in cell.outputs:
                output.text = cleaned(output.text, root)
    book.metadata.language_info = {"name": "python"}
    nbformat.write(book, notebook)


if __name__ == "__main__":
    execute(Path(sys.argv[1]) if len(sys.argv) > 1 else NOTEBOOK)
