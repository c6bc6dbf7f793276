"""One configuration in one run folder: whether it may be run there, and the attempt.

Nothing heavy is imported before the attempt.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

from flare_exp.config import composition, schema
from flare_exp.config.options import flat
from flare_exp.errors import UserError, first_line, out_of_room
from flare_exp.experiment import checksums
from flare_exp.utils import signals

# Options that do not change a result, so that a run folder may be taken up again with others. The
# model's name changes none
# either, but stands in metrics.json.
VOLATILE = {*schema.no_effect(), *schema.RETIRED} - {"model.name"}


def check_writable(folder: Path, option: str = "output_dir") -> Iterator[str]:
    """Yield a problem if nothing can be written to `folder`, which is made if need be.

    `option` is the key that names the folder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable.{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        yield f"{option}={folder}: cannot be written ({error.strerror})"


def missing_folders(folders: Sequence[Path]) -> list[Path]:
    """Return those of some folders and of their parents that are not there, the innermost first."""
    return [
        place for folder in folders for place in (folder, *folder.parents) if not place.exists()
    ]


def unused(folder: Path) -> Path:
    """Make a folder that no other command uses: `folder`, or one with `_2`, `_3`, ... behind it."""
    place, numbers = folder, itertools.count(2)
    while os.path.lexists(place) or not _made(place):
        place = folder.with_name(f"{folder.name}_{next(numbers)}")
    return place


def _made(folder: Path) -> bool:
    """Make a folder; return False if another command has been faster.

    What cannot be made passes: the check of the folder says why.
    """
    try:
        folder.mkdir(parents=True)
    except OSError:
        return not os.path.lexists(folder)
    return True


def remove_empty(folders: Sequence[Path]) -> None:
    """Remove folders that a refused command has made; what holds something stays."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def check_folder(cfg: Any, folder: Path) -> Iterator[str]:
    """Problems with a run folder: it cannot be written, or it holds another run."""
    yield from list(check_writable(folder)) or check_content(cfg, folder)


def check_content(cfg: Any, folder: Path) -> Iterator[str]:
    """Yield a problem if a run folder, which need not be there, may not be taken up."""
    if not cfg.resume and (folder / "config.yaml").is_file():
        yield f"output_dir={folder}: it holds a run already and resume=false; choose another folder"
        return
    yield from _check_same_run(cfg, folder)


def _check_same_run(cfg: Any, folder: Path) -> Iterator[str]:
    """Yield a problem if a run folder, which need not be there, holds another run."""
    from omegaconf import OmegaConf

    stored = folder / "config.yaml"
    if (folder / "metrics.json").is_file() and (
        changed := checksums.damage(folder, only=["config.yaml"])
    ):
        if stored.is_file() and "config.yaml" in changed[0]:
            yield (
                f"output_dir={folder}: its {changed[0]}, so it cannot be told which run it "
                "holds; choose another folder"
            )
            return
    try:
        before = OmegaConf.load(stored) if stored.is_file() else None
        old = flat({} if before is None else OmegaConf.to_container(before, resolve=True))
    except Exception as error:  # yaml raises its own kinds
        yield (
            f"output_dir={folder}: its config.yaml is unreadable ({first_line(error)}); "
            "choose another folder"
        )
        return
    if before is None:
        if (folder / "metrics.json").exists():
            yield (
                f"output_dir={folder}: it holds a metrics.json but no config.yaml; choose "
                "another folder"
            )
        return
    new = flat(OmegaConf.to_container(cfg, resolve=True))
    defaults = schema.dataclass_defaults()
    # an earlier version did not have these options, and ran as their defaults say
    old |= {k: defaults[k] for k in new.keys() & defaults.keys() - old.keys()}
    differing = [k for k in sorted({*old, *new}) if old.get(k) != new.get(k) and k not in VOLATILE]
    if differing:
        shown = ", ".join(f"{k} ({old.get(k)} there, {new.get(k)} here)" for k in differing)
        yield f"output_dir={folder}: it holds another run, which differs in {shown}"


def run_if_secondary_node(cfg: Any) -> bool:
    """Return True on a further machine of a run (trainer.nodes), after its part is done.

    A finished run has no part left: rank 0 shows its result, or refuses its folder.
    """
    machine = int(os.environ.get("SLURM_PROCID", 0)) if cfg.trainer.nodes > 1 else 0
    folder = Path(str(cfg.output_dir)).expanduser()
    if machine and (not (folder / "metrics.json").is_file() or checksums.damage(folder)):
        from flare_exp.experiment import launch

        launch.run_secondary_node(
            machine, cfg.trainer.devices, cfg.trainer.nodes, cfg.trainer.accelerator
        )
    return machine > 0


def discard_damaged(folder: Path) -> None:
    """Remove the result from a damaged run folder, and say that the run is made again."""
    import logging

    if (folder / "metrics.json").is_file() and (problems := checksums.damage(folder)):
        shown = ", ".join(problems[:5]) + (", ..." if len(problems) > 5 else "")
        logging.getLogger(__name__).warning(
            "output_dir=%s is damaged: %s; the run is made again, from the artifacts in the "
            "cache where they are",
            folder,
            shown,
        )
        (folder / "metrics.json").unlink()


def attempt(cfg: Any, folder: Path, brief: bool = False) -> str | None:
    """Run one configuration in `folder`.

    Args:
        brief: print the result as one line instead of a table.

    Returns:
        why it failed, if that is something that the user can correct.

    Raises:
        SystemExit: it was stopped; what it had done is kept.
    """
    import logging

    from flare_exp.experiment import run_state

    logging.raiseExceptions = (
        False  # a log on a full disk is not worth a traceback for each of its lines
    )
    done = (folder / "metrics.json").is_file() and not checksums.damage(folder)
    try:
        with nullcontext() if done else run_state.running(folder):
            # again: another command may have begun here since the first check
            if problems := list(_check_same_run(cfg, folder)):
                raise UserError("; ".join(problems))
            discard_damaged(folder)
            run_job(cfg, folder, brief)
    except UserError as error:
        return str(error)
    except signals.StopRequested as stop:
        raise SystemExit(_stopped(stop)) from None
    except (KeyboardInterrupt, SystemExit):  # Lightning turns Ctrl-C during training into an exit
        print(
            "\nstopped; finished stages are kept, and the same command goes on after them",
            file=sys.stderr,
        )
        raise SystemExit(130) from None
    except Exception as error:  # every library has its own for a full disk
        if (reason := out_of_room(error)) is None:
            raise
        place = (
            getattr(error, "filename2", None) or getattr(error, "filename", None) or folder
        )  # a copy has two
        return (
            f"no more can be written to {place}: {reason}; when there is room, the same "
            "command goes on"
        )
    return None


def attempt_in_grid(cfg: Any, folder: Path) -> str | None:
    """Like `attempt`; what nobody foresaw is a reason too, so that the other jobs go on."""
    try:
        return attempt(cfg, folder, brief=True)
    except Exception as error:
        return crashed(error, folder)


def crashed(error: Exception, folder: Path) -> str:
    """Write the traceback of an unforeseen error into the run's log; returns a line about it."""
    log = folder / "flare_exp.log"
    try:
        with log.open("a") as file:
            traceback.print_exception(error, file=file)
        where = f"; the traceback is in {log}"
    except OSError:
        where = ""
        traceback.print_exception(error)
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}{where}"


def _stopped(stop: signals.StopRequested) -> int:
    """Say so, and have SLURM start the job again if it gave the warning; returns the exit code."""
    print(f"flare_exp: {stop}", file=sys.stderr, flush=True)
    if stop.by is signal.SIGUSR1:
        try:
            if job := signals.requeue():
                print(
                    f"flare_exp: SLURM job {job} is back in the queue", file=sys.stderr, flush=True
                )
        except RuntimeError as error:
            print(f"flare_exp: {error}", file=sys.stderr)
    return 128 + stop.by


def as_stored(cfg: Any) -> str:
    """Return the text of config.yaml: all values resolved, and read again as they are."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(composition.literal(OmegaConf.to_container(cfg, resolve=True)))


def run_job(cfg: Any, folder: Path, brief: bool = False) -> dict[str, Any]:
    """Run one configuration in `folder`, or return the result that is there already.

    The result is printed.
    """
    import json
    import logging

    from omegaconf import OmegaConf

    from flare_exp.experiment import provenance, results
    from flare_exp.experiment.notes import notes
    from flare_exp.utils import files

    typed: schema.Config = OmegaConf.to_object(cfg)  # type: ignore[assignment]
    folder.mkdir(parents=True, exist_ok=True)
    done = folder / "metrics.json"
    if done.is_file():  # nothing heavy is imported for it
        logging.getLogger(__name__).info(
            "this run is complete; showing the stored result (files that its options name are not "
            "compared)"
        )
        measured = json.loads(done.read_text())
    else:
        # an interrupted import leaves modules half made, which then fail with errors of their own
        with signals.deferred("the libraries are imported"):
            quiet(typed)
            from flare_exp.experiment import pipeline
        signals.raise_if_signalled("before the first stage")
        files.write_text(folder / "config.yaml", as_stored(cfg))
        provenance.PEAK.begin()
        measured = pipeline.run(typed, folder)
    if brief:
        print(f"{folder}: {results.one_line(measured)}", flush=True)
    else:
        results.print_table(measured, notes(typed, folder), folder)
    return measured


def quiet_as(folder: str | Path, options: Sequence[str]) -> None:
    """Call `quiet` for a finished run, whose `config.yaml` is read without heavy imports.

    Args:
        folder: the run folder. What is wrong in it is told where it is loaded.
        options: changes of its options; the last `offline=` counts.
    """
    import yaml

    given = [word.partition("=")[2] for word in options if word.startswith("offline=")]
    if not given:
        with suppress(OSError, ValueError, AttributeError, yaml.YAMLError):
            stored = (Path(folder).expanduser() / "config.yaml").read_text(encoding="utf-8")
            given = [str(yaml.safe_load(stored).get("offline"))]
    offline = bool(given) and given[-1].strip("'\"").lower() in ("true", "1", "yes", "on")
    quiet(schema.Config(offline=offline))


def quiet(cfg: schema.Config) -> None:
    """Set up the network and silence libraries; it is called before they are imported."""
    import logging
    import warnings

    from flare_exp import hub

    hub.offline(cfg.offline)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*number of training batches.*")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    warnings.filterwarnings(
        "ignore", message=".*directory .* exists and is not empty.*"
    )  # as it must be to go on
    warnings.filterwarnings(
        "ignore", message=".*`base_model_name_or_path` was renamed.*"
    )  # to the run folder
    warnings.filterwarnings("ignore", message=".*`srun` command is available.*")
    warnings.filterwarnings(
        "ignore", message=".*custom batch sampler `RankShardBatchSampler` for prediction.*"
    )
    logging.getLogger("bitsandbytes").setLevel(
        logging.ERROR
    )  # it misses optional kernels, and says so when peft looks at it
    import lightning.pytorch  # noqa: F401
    import transformers

    # these set their own level and handler when they are imported
    for name in (
        "lightning",
        "lightning.pytorch",
        "lightning.fabric",
        "httpx",
        "filelock",
        "fsspec",
    ):
        logger = logging.getLogger(name)
        logger.setLevel(logging.WARNING)
        logger.handlers.clear()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
