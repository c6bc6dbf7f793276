"""Find out what runs take from the Hugging Face hub, and fetch it."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from typing import Any

from flare_exp import hub
from flare_exp.config import schema
from flare_exp.config.composition import systems_of
from flare_exp.config.methods import members_of
from flare_exp.tasks import Benchmark, CustomTask, TyDiQA, XQuAD, task_class
from flare_exp.tasks.spec import hub_splits

THERE = "there already"


def hub_resources(cfg: schema.Config) -> list[hub.HubResource]:
    """Everything that a run of this configuration takes from the hub."""
    models = [("backbone", cfg.model.path, cfg.model.revision)]
    if any(m.translates for m in members_of(cfg.method).values()):
        systems = [own.mt for own in (cfg, *systems_of(cfg)) if own.mt.kind == "model"]
        models += [("translation model", mt.path, mt.revision) for mt in systems]
    found: list[hub.HubResource] = [
        hub.Checkpoint(what, path, at)
        for what, path, at in models
        if path and not hub.looks_local(path)
    ]
    task = task_class(cfg.task.name, cfg.task.spec)
    langs = list(dict.fromkeys((task.english, *cfg.task.tested, *cfg.source.langs)))
    if issubclass(task, CustomTask):
        used = hub_splits(task.spec, langs)
        found += [hub.DataSet("data set", s.hub_id, s.revision, s.config) for s in used]
    elif issubclass(task, Benchmark) and not cfg.task.data_dir:
        configs = dict.fromkeys(task.hub_config(lang) for lang in langs)
        found += [hub.DataSet("data set", task.hub_id, task.revision, name) for name in configs]
        if issubclass(task, XQuAD):
            name = TyDiQA.hub_config(task.english)
            found.append(hub.DataSet("training data", TyDiQA.hub_id, TyDiQA.revision, name))
    return found


def hub_resources_of_jobs(jobs: Sequence[Any]) -> list[hub.HubResource]:
    """List what the jobs of a command line need, everything once."""
    from omegaconf import OmegaConf

    typed: list[Any] = [OmegaConf.to_object(job) for job in jobs]
    return list(dict.fromkeys(need for job in typed for need in hub_resources(job)))


def inspect(need: hub.HubResource) -> tuple[hub.CacheStatus, str]:
    """Look up what the caches hold, without network; returns the state in words too."""
    found = need.find()
    return found, f"missing {found.lacks}" if found.lacks else THERE


def download(need: hub.HubResource) -> tuple[hub.CacheStatus, str]:
    """Fetch what the caches lack; gives what they hold then, and the state in words."""
    before = need.find()
    if need.pinned and not before.lacks:
        return before, THERE
    try:
        need.fetch()
    # the hub's libraries raise many kinds, and the other things are still to be fetched
    except Exception as error:
        reason = hub.reason(error)
        return (
            before,
            f"failed: {reason}"
            if before.lacks
            else f"{THERE}; whether it is the newest is unknown: {reason}",
        )
    after = need.find()
    if after.lacks:
        return after, f"failed: the hub does not give {after.lacks}"
    return after, THERE if after == before else "fetched"


def checked(jobs: Sequence[Any], given: Sequence[str], multirun: bool) -> str | None:
    """Check that the jobs of a command line can have what they take from the hub.

    What will be downloaded is printed. Where the hub does not answer, the jobs run from the caches,
    as with offline=true.

    Returns:
        why they cannot run, with the command that fetches what is missing; None: they can.
    """
    only_look, wanted = hub.offline(any(job.offline for job in jobs)), hub_resources_of_jobs(jobs)
    silent = None if only_look or not wanted else hub.unreachable()
    if only_look or silent:
        hub.offline(True)  # before the hub's libraries are imported
        return offline_problem(wanted, given, multirun, silent)
    return announced([need for need in wanted if need.find().lacks])


def announced(needs: Sequence[hub.HubResource]) -> str | None:
    """Say what will be downloaded and how much that is; returns why something cannot be."""
    from rich.filesize import decimal

    for need in needs:
        try:
            print(
                f"downloads {need}: {decimal(need.download())} into {need.cache}",
                file=sys.stderr,
                flush=True,
            )
        except Exception as error:  # the hub's libraries raise many kinds
            return f"{need}: {hub.reason(error)}\nNothing was run."
    return None


def offline_problem(
    needs: Sequence[hub.HubResource],
    given: Sequence[str],
    multirun: bool,
    silent: str | None = None,
) -> str | None:
    """Say what is missing to run without network, and which command fetches it.

    Args:
        silent: why the hub does not answer, if it was asked.

    Returns:
        None: nothing is missing.
    """
    missing = [(need, lacks) for need in needs if (lacks := need.find().lacks)]
    if not missing:
        return None
    overrides = [
        a
        for a in given
        if "=" in a
        and a.partition("=")[0] not in ("offline", "output_dir")
        and not a.startswith("-")
    ]
    return "\n".join(
        [
            f"{silent or 'offline'}, but the local caches do not hold all that is taken from "
            f"the hub ({len(missing)} missing)",
            *(f"  - {need}: missing {lacks}{_no_folder(need)}" for need, lacks in missing),
            "Nothing was run. On a machine with network that shares "
            f"{cache_names([need for need, _ in missing])}:",
            "  python -m flare_exp prefetch "
            f"{shlex.join([*(['-m'] if multirun else []), *overrides])}",
        ]
    )


def _no_folder(need: hub.HubResource) -> str:
    """Say that a name without an owner is no folder either: it may be a misspelt one."""
    plain = isinstance(need, hub.Checkpoint) and "/" not in need.hub_id
    return f"; there is no folder {need.hub_id} here either" if plain else ""


def cache_names(found: Sequence[hub.HubResource]) -> str:
    """Name the caches that hold what is needed."""
    return " and ".join(dict.fromkeys(need.cache for need in found))
