"""`python -m flare_exp serve run=FOLDER`: predict over HTTP with the model of a finished run.

POST /predict takes {"texts": [...]}, and "sources": [...] if you have English translations; a text
of a task with several fields is an object. GET /health, GET /metrics (Prometheus), and a page at /
to try it by hand. Ctrl-C or SIGTERM ends the server after it has answered what it has accepted.

  run=FOLDER      the run folder
  host=HOST       address to listen on [127.0.0.1]; any other needs a token
  port=PORT       [8000]; 0: any free one
  token=TOKEN     what clients must send as Authorization: Bearer TOKEN; better in the environment,
                  where other users do not see it: FLARE_EXP_TOKEN
  max_body=N, max_texts=N, max_length=N, max_seconds=N, max_waiting=N
                  limits: bytes of a request [1000000], its texts [256], characters of a text
                  [10000], seconds [60], and texts of all requests that wait [2048]
  data.batch_size=N
                  most texts that are read together [the run's]
  mt=..., trainer.accelerator=..., model.path=..., cache_dir=..., offline=true
                  as for predict

Examples:
  python -m flare_exp serve run=outputs/my_run
  python -m flare_exp serve run=outputs/my_run port=9000 mt=nllb_600m data.batch_size=16

It needs FastAPI: pip install 'flare-exp[serve]'. docs/use.md describes requests and limits.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from flare_exp.cli.predict import Given
from flare_exp.cli.predict import parse as sorted_words
from flare_exp.errors import UserError
from flare_exp.experiment.runs import quiet_as
from flare_exp.utils import signals
from flare_exp.utils.suggestions import nearest

if TYPE_CHECKING:
    import uvicorn
    from fastapi import FastAPI

    from flare_exp.serving.batching import Batcher
    from flare_exp.serving.requests import Limits
    from flare_exp.translation.machine import MachineTranslator

LIMITS = ("max_body", "max_texts", "max_length", "max_seconds", "max_waiting")
KEYS = ("run", "host", "port", "token", *LIMITS)
LOCAL = ("127.0.0.1", "localhost", "::1")
TOKEN = "FLARE_EXP_TOKEN"
PATIENCE = 2.0  # seconds that a batch has to end in


def parse(arguments: Sequence[str]) -> Given:
    """Read the words of the command line.

    Raises:
        UserError: an option or its value is wrong; one message names all mistakes.
    """
    given = sorted_words(arguments, KEYS)
    problems = [
        f"{name}: there is no such key; {', '.join(KEYS)}{nearest(name, KEYS)}"
        for name in given.texts
    ]
    problems += _number_problems(given.values)
    token = token_of(given) or ""
    if not (token.isascii() and token.isprintable() and token == token.strip()):
        problems.append(
            "token: must be printable ASCII without spaces around it, as a header carries it"
        )
    if _host(given) not in LOCAL and not token:
        problems.append(
            f"host={_host(given)}: others can reach it, so it needs a token: set {TOKEN} "
            "or token=..."
        )
    if problems:
        raise UserError("; ".join(problems))
    return given


def _number_problems(values: Mapping[str, str]) -> Iterator[str]:
    """Yield what is wrong with the numbers of a command line."""
    for name in ("port", *LIMITS):
        value = values.get(name, "1")
        least, most = (0, 65535) if name == "port" else (1, 10**9)
        if not (value.isascii() and value.isdigit() and least <= int(value) <= most):
            yield f"{name}={value}: must be a whole number, {least} to {most}"


def token_of(given: Given) -> str | None:
    """Return the token that clients must send; None: none."""
    return given.values.get("token") or os.environ.get(TOKEN) or None


def main(arguments: Sequence[str]) -> int:
    """Serve until a signal ends it; return the exit code."""
    given = parse(arguments)
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise UserError(f"{error.name} is not installed; pip install 'flare-exp[serve]'") from None
    limits = _limits(given.values)
    quiet_as(given.run, given.options)
    import flare_exp
    from flare_exp.serving.app import Access, make_app

    with _bound(given) as address:
        run = flare_exp.load(given.run, *given.options)
        run.check_new_texts()
        _limit_translator(run.translator.machine, limits.seconds)
        app = make_app(run, limits, Access(token_of(given), LOCAL if _host(given) in LOCAL else ()))
        # a request is read and answered, each in that time
        grace = 2 * int(limits.seconds) + 10
        config = uvicorn.Config(
            app, log_level="warning", lifespan="off", timeout_graceful_shutdown=grace
        )
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, _nothing)
        host, port = address.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        _listen(address, port)
        print(f"serving {given.run} at http://{shown}:{port}; Ctrl-C ends it", flush=True)
        asyncio.run(_answer(app, uvicorn.Server(config), address))
    cut = app.state.cut_off
    said = (
        f"requests that it cut off: {cut}" if cut else "every request that was accepted is answered"
    )
    print(f"ended; {said}", flush=True)
    _end(app.state.batcher)
    return 0


def _limit_translator(machine: MachineTranslator | None, seconds: float) -> None:
    """End a program that translates for longer than a request waits: others wait for it."""
    from flare_exp.translation.command import CommandEngine

    if machine and isinstance(model := machine.model, CommandEngine):
        machine.model = replace(model, timeout=min(model.timeout, seconds))


async def _answer(app: FastAPI, server: uvicorn.Server, address: socket.socket) -> None:
    """Answer requests until a signal ends the server.

    After a second signal uvicorn does not end the application, and logs that as an error.
    """
    async with app.router.lifespan_context(app):
        await server.serve([address])


def _listen(address: socket.socket, port: int) -> None:
    """Let clients connect.

    Raises:
        UserError: another server that took the same address has been faster.
    """
    try:
        address.listen()
    except OSError as error:
        raise UserError(
            f"port={port}: another server has taken it meanwhile ({error.strerror}); choose another"
        ) from None


def _end(batcher: Batcher) -> None:
    """End this process if the model still works on a batch, for which no request waits any more."""
    signals.request_stop()  # ends a program that translates
    if not batcher.is_free(PATIENCE):
        sys.stderr.flush()
        os._exit(0)


def _nothing(*_: object) -> None:
    """Do nothing: uvicorn raises the signal that ended it again, when all is done."""


def _host(given: Given) -> str:
    return given.values.get("host", LOCAL[0])


def _limits(values: Mapping[str, str]) -> Limits:
    """Return the limits of requests.

    Raises:
        UserError: a request could have more texts than may wait.
    """
    from flare_exp.serving.requests import Limits

    given = {key.removeprefix("max_"): int(values[key]) for key in LIMITS if key in values}
    limits = Limits(**given)
    if limits.texts > limits.waiting:
        raise UserError(
            f"max_texts={limits.texts} max_waiting={limits.waiting}: a request with more than "
            f"{limits.waiting} texts would always be refused; give a smaller max_texts or a larger "
            "max_waiting"
        )
    return limits


def _bound(given: Given) -> socket.socket:
    """Take the address before anything is loaded; clients cannot connect to it until `_listen`.

    Raises:
        UserError: the address cannot be had.
    """
    host, port = _host(given), int(given.values.get("port", "8000"))
    try:
        family, *_, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        made = socket.socket(family)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(place)
    except OSError as error:
        raise UserError(f"host={host} port={port}: cannot be had ({error.strerror})") from None
    return made
