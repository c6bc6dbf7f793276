"""Send requests to a running server and measure it: python sweeps/serve_load.py FILE [options].

FILE has one text a line; each request takes the next --texts of them, and begins anew at its end. A
request whose connection breaks, or that the server is too busy for, is sent again (--again seconds
long), so that a server can be killed and started again meanwhile. "refused" connections were never
accepted, "broken" ones ended without an answer.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import statistics
import time
from collections import Counter
from pathlib import Path

import httpx


async def ask(client: httpx.AsyncClient, texts: list[str], seen: Counter, again: float) -> float:
    """Send one request until it is answered; return the seconds of the answered attempt."""
    end = time.monotonic() + again
    while True:
        start = time.perf_counter()
        try:
            answer = await client.post("/predict", json={"texts": texts})
            if answer.status_code != 503:
                seen[str(answer.status_code)] += 1
                if answer.status_code == 200:
                    assert len(answer.json()["predictions"]) == len(texts)
                return time.perf_counter() - start
            seen["busy"] += 1
        except httpx.ConnectError:
            seen["refused"] += 1
        except httpx.TransportError:
            seen["broken"] += 1
        if time.monotonic() > end:
            seen["lost"] += 1
            return time.perf_counter() - start
        await asyncio.sleep(0.2)


async def main(given: argparse.Namespace) -> None:
    lines = itertools.cycle(given.file.read_text().splitlines())
    seen: Counter = Counter()
    work = iter([[next(lines) for _ in range(given.texts)] for _ in range(given.requests)])
    seconds: list[float] = []
    async with httpx.AsyncClient(base_url=given.url, timeout=120) as client:

        async def worker() -> None:
            for texts in work:
                seconds.append(await ask(client, texts, seen, given.again))

        start = time.perf_counter()
        await asyncio.gather(*(worker() for _ in range(given.at_once)))
        whole = time.perf_counter() - start
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    print(f"{given.requests} requests, {given.at_once} at once, {given.texts} texts each")
    print("  ".join(f"{name}: {count}" for name, count in sorted(seen.items())))
    print(f"p50 {1000 * cuts[49]:.0f} ms, p99 {1000 * cuts[98]:.0f} ms")
    speed = given.requests / whole
    print(f"{speed:.1f} requests/s, {speed * given.texts:.1f} texts/s")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made.add_argument("file", type=Path)
    made.add_argument("--url", default="http://127.0.0.1:8000")
    made.add_argument("--requests", type=int, default=200)
    made.add_argument("--at-once", type=int, default=16)
    made.add_argument("--texts", type=int, default=1)
    made.add_argument("--again", type=float, default=60.0)
    return made


if __name__ == "__main__":
    asyncio.run(main(parser().parse_args()))
