"""Show the progress of work on many texts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def bar(description: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a progress bar over `total` texts, and yield the function that advances it.

    The bar shows texts per second and the time left. Long texts come first, so the time left is
    overestimated rather than underestimated.
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
    # not rich's common console, which remembers whether it was on a terminal at first
    with Progress(
        *columns, console=Console(), transient=True, speed_estimate_period=300
    ) as progress:
        task = progress.add_task(description, total=total)
        yield lambda finished: progress.advance(task, finished)
