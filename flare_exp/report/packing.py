"""Pack the runs of a report into an archive, from which anybody can make the same report.

A table that is published with its runs can be checked, and continued on another machine. Paths,
arguments of programs (which may be keys of a service) and the texts of the data are left out.
"""

from __future__ import annotations

import json
import os
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from flare_exp.experiment.checksums import CHECKSUMS, damage, seal
from flare_exp.hub import looks_local
from flare_exp.report.cells import cells_of
from flare_exp.report.predictions import FILE
from flare_exp.report.runs import READING, Run, read, run_folders
from flare_exp.utils.files import replacing, write_json
from flare_exp.utils.programs import program_of

ENDING = ".tar.xz"
CURVE = "curves/transfer.csv"
# options that are paths; model.path and mt.path may be hub ids
PLACES = ("output_dir", "cache_dir", "data_dir", "train_data_dir", "spec", "texts")
COLUMNS = ["id", "gold", "prediction"]  # of predictions.parquet
# of provenance.json; what is left out holds the command line
FACTS = (
    *("commit", "python", "packages", "device", "threads", "code", "artefacts"),
    *("data", "parameters", "training", "peak_memory_bytes", "peak_gpu_memory_bytes"),
)


def pack(folders: Sequence[str], archive: Path) -> int:
    """Write the finished runs below some folders to an archive; return their number.

    The same runs give the same bytes. A run is in the archive under its path below the folder
    that all runs share.

    Args:
        folders: folders of runs, or of grids.
        archive: the file, with the ending .tar.xz; it is replaced.

    Raises:
        ValueError: a run is damaged, or runs differ only in what is left out; the message names
            the folder.
    """
    runs = []
    for folder in (f for f in run_folders(folders) if not (f / READING).is_file()):
        try:
            runs.append(read(folder))
        except ValueError as error:
            if (folder / "metrics.json").is_file():
                raise ValueError(f"{folder}: {error}") from None
    shared = Path(os.path.commonpath([run.folder.parent for run in runs])) if runs else Path()
    with tempfile.TemporaryDirectory() as place:
        copies = [_copy(run.folder, Path(place) / run.folder.relative_to(shared)) for run in runs]
        _check_cells(runs, copies)
        with replacing(archive) as part, tarfile.open(part, "w:xz") as file:
            for path in sorted(Path(place).rglob("*")):
                file.add(path, path.relative_to(place), recursive=False, filter=_anonymous)
    return len(runs)


def _check_cells(runs: Sequence[Run], copies: Sequence[Run]) -> None:
    """Check that what was left out told no runs apart.

    Raises:
        ValueError: it did.
    """
    (before, repeated), (after, alike) = cells_of(runs), cells_of(copies)
    counts = [sum(map(len, tasks.values())) for tasks in (before, after)]
    if counts[0] != counts[1] or len(alike) > len(repeated):
        raise ValueError(
            "some runs differ in a path or in the arguments of a program alone, which are left "
            "out; pack them apart"
        )


def _anonymous(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    """Leave out who packed a file, and when."""
    entry.uid = entry.gid = entry.mtime = 0
    entry.uname = entry.gname = ""
    entry.mode = 0o755 if entry.isdir() else 0o644
    return entry


def _copy(run: Path, place: Path) -> Run:
    """Copy what a report reads of a run, and read the copy.

    Raises:
        ValueError: a file is damaged.
    """
    import pyarrow.parquet as pq

    copied = ["metrics.json", "config.yaml", "provenance.json", FILE, CURVE]
    if problems := damage(run, only=copied):
        raise ValueError(f"{run}: {problems[0]}")
    place.mkdir(parents=True)
    (place / "metrics.json").write_bytes((run / "metrics.json").read_bytes())
    options = yaml.safe_load((run / "config.yaml").read_text())
    if command := (options.get("mt") or {}).get("command"):
        options["mt"]["command"] = program_of(command)
    (place / "config.yaml").write_text(yaml.safe_dump(_without_paths(options), sort_keys=False))
    if (run / "provenance.json").is_file():
        facts = json.loads((run / "provenance.json").read_text())
        write_json(place / "provenance.json", {key: facts[key] for key in FACTS if key in facts})
    if (run / FILE).is_file():
        # the archive compresses what runs share, if the files in it are not compressed
        pq.write_table(pq.read_table(run / FILE, columns=COLUMNS), place / FILE, compression="none")
    if (run / CURVE).is_file():
        (place / CURVE).parent.mkdir()
        (place / CURVE).write_bytes((run / CURVE).read_bytes())
    sums = seal(place)
    for facts in sums.values():
        facts["mtime_ns"] = 0
    write_json(place / CHECKSUMS, sums)
    return read(place)


def _without_paths(value: Any, key: str = "") -> Any:
    """Return options in which the last part alone is left of every path. `key`: their name."""
    if isinstance(value, Mapping):
        return {name: _without_paths(inner, name) for name, inner in value.items()}
    if isinstance(value, list):
        return [_without_paths(inner) for inner in value]
    if not isinstance(value, str):
        return value
    place = key in PLACES or (key == "path" and looks_local(value))
    return Path(value).name if place or value.startswith(("/", "~")) else value
