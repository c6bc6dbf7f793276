"""Show the progress of work on many texts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def bar(description: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar over `total` texts, with texts per second and the time left; gives the function that moves it on.

    Long texts come first, so the time left is estimated too long rather than too short.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        Task,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class Speed(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(f"{task.speed:.1f} texts/s" if task.speed else "")

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        Speed(),
        TimeRemainingColumn(),
    )
    # a console of its own: rich's common one decides for good, when it is first asked for, whether it is on a terminal
    with Progress(
        *columns, console=Console(), transient=True, speed_estimate_period=300
    ) as progress:
        task = progress.add_task(description, total=total)
        yield lambda finished: progress.advance(task, finished)
