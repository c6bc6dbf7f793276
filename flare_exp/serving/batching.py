"""Answer requests that come at the same time in common batches."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

from flare_exp.data.rows import Row
from flare_exp.errors import UserError
from flare_exp.experiment.predicting import Result

Predict = Callable[[Sequence[Row]], Sequence[Result]]


class TooBusy(Exception):
    """Error for texts that come while too many others wait."""


class Batcher:
    """Collect texts while the model works, and give them to it as the next batch.

    A text waits for no other: a batch is what has come when the model is free. One thread runs the
    model. Texts are answered in the order of their coming.

    Args:
        predict: rows -> results; called in the thread.
        size: most texts of a batch.
        most: most texts that wait.
        seen: called with the number of texts of each batch.
    """

    def __init__(self, predict: Predict, size: int, most: int, seen: Callable[[int], Any]):
        self.predict, self.size, self.most, self.seen = predict, size, most, seen
        self.waiting: deque[tuple[Row, asyncio.Future[Result]]] = deque()
        self.woken = asyncio.Event()
        self.thread = ThreadPoolExecutor(1, "model")
        self.computed: Future[Sequence[Result]] | None = None

    async def ask(self, rows: Sequence[Row]) -> list[Result]:
        """Return the results of some rows. If the caller gives up, the rows no longer wait.

        Raises:
            TooBusy: too many texts wait.
            UserError: a row cannot be translated, or cannot be answered for another reason.
        """
        if len(self.waiting) + len(rows) > self.most:
            raise TooBusy
        loop = asyncio.get_running_loop()
        futures = [loop.create_future() for _ in rows]
        self.waiting.extend(zip(rows, futures, strict=True))
        self.woken.set()
        try:
            return await asyncio.gather(*futures)
        finally:
            for future in futures:
                future.cancel()

    async def work(self) -> None:
        """Answer batch after batch, until this task ends; a batch that is begun goes on."""
        try:
            while True:
                await self.woken.wait()
                if batch := self._next():
                    await self._answer(batch)
                else:
                    self.woken.clear()
        finally:
            self.thread.shutdown(wait=False)

    def is_free(self, seconds: float) -> bool:
        """Wait until the model has no batch, that long at most; return whether it has none."""
        return self.computed is None or not wait([self.computed], seconds).not_done

    def _next(self) -> list[tuple[Row, asyncio.Future[Result]]]:
        """Take the next batch, without texts whose requests were given up."""
        batch: list[tuple[Row, asyncio.Future[Result]]] = []
        while self.waiting and len(batch) < self.size:
            row, future = self.waiting.popleft()
            if not future.done():
                batch.append((row, future))
        return batch

    async def _answer(self, batch: Sequence[tuple[Row, asyncio.Future[Result]]]) -> None:
        """Answer a batch. If a text of it is in the way, each one is tried by itself."""
        rows = [row for row, _ in batch]
        try:
            self.computed = self.thread.submit(self.predict, rows)
            results = await asyncio.wrap_future(self.computed)
        except Exception as error:
            if isinstance(error, UserError) and len(batch) > 1:
                for row, future in batch:
                    if not future.done():
                        await self._answer([(row, future)])
                return
            for _, future in batch:
                if not future.done():
                    future.set_exception(error)
        else:
            self.seen(len(batch))
            for (_, future), result in zip(batch, results, strict=True):
                if not future.done():
                    future.set_result(result)
