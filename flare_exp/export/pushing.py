"""Show what an upload to the hub would send, and send it."""

from __future__ import annotations

from pathlib import Path

from flare_exp.errors import UserError
from flare_exp.experiment.checksums import damage
from flare_exp.export.portable import leaks
from flare_exp.hub import offline, reason


def files_of(folder: Path) -> dict[str, int]:
    """Return the files of an exported folder, with their sizes in bytes."""
    return {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def check(folder: Path) -> None:
    """Check that a folder is an export that may be uploaded.

    Raises:
        UserError: it is none, is damaged, or names a path of this machine.
    """
    if not (folder / "reading.json").is_file():
        raise UserError(f"to={folder}: there is no exported run in it; give run=<run folder>, too")
    problems = list(leaks(folder, {str(Path.home()), str(folder.resolve().parent)}))
    if (folder / "checksums.json").is_file():
        problems += damage(folder)
    if problems:
        raise UserError(f"to={folder}: {'; '.join(problems)}")


def push(folder: Path, repository: str, private: bool) -> str:
    """Upload an exported folder to a model repository, which may be new; return its address.

    Raises:
        UserError: the hub refuses, or cannot be reached.
    """
    offline(False)
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(repository, private=private, exist_ok=True)
        done = api.upload_folder(
            repo_id=repository, folder_path=folder, commit_message="Export of flare_exp"
        )
    except Exception as error:  # the hub's libraries raise many kinds
        raise UserError(f"push={repository}: the upload failed: {reason(error)}") from error
    return str(done.commit_url)
