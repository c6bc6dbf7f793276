"""Read a request for predictions, within limits, and describe its mistakes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from starlette.requests import ClientDisconnect, Request

from flare_exp.data.rows import Row, text_problem
from flare_exp.errors import first_line

KEYS = ("texts", "sources")


@dataclass(frozen=True)
class Limits:
    """Limits of a request.

    Attributes:
        body: most bytes of its body.
        texts: most texts.
        length: most characters of a text, or of a source.
        seconds: longest time, for reading it and for answering it.
        waiting: most texts of all requests that wait for the model.
    """

    body: int = 1_000_000
    texts: int = 256
    length: int = 10_000
    seconds: float = 60.0
    waiting: int = 2048


class Refused(Exception):
    """Error for a request that gets no predictions.

    Args:
        status: HTTP status code.
        message: what is wrong, for the client.
    """

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status, self.message = status, message


async def read_body(request: Request, limits: Limits) -> bytes:
    """Read the body of a request, which must be JSON by its content type.

    Raises:
        Refused: it is of another type, too large, too slow, or empty.
    """
    # a page of another site can send other types without asking
    kind = request.headers.get("content-type", "").partition(";")[0]
    if kind.strip().lower() != "application/json":
        raise Refused(415, "the content type must be application/json")
    try:
        body = await asyncio.wait_for(_read(request, limits.body), limits.seconds)
    except asyncio.TimeoutError:
        raise Refused(408, f"the body did not come within {limits.seconds:g} seconds") from None
    except ClientDisconnect:
        raise Refused(400, "the body did not come") from None
    if not body:
        raise Refused(400, 'the body is empty; send {"texts": [...]}')
    return body


async def _read(request: Request, most: int) -> bytes:
    """Read a body; one that is announced as too large is not waited for."""
    body, announced = bytearray(), request.headers.get("content-length", "")
    if not (announced.isdigit() and int(announced) > most):
        async for piece in request.stream():
            body += piece
            if len(body) > most:
                break
        else:
            return bytes(body)
    raise Refused(413, f"the body has more than {most:,} bytes")


def rows_of(body: bytes, fields: Sequence[str], parts: Sequence[str], limits: Limits) -> list[Row]:
    """Return the rows of a body.

    Args:
        body: the body.
        fields: names of a text's fields.
        parts: names of its source texts; empty: the method reads none.
        limits: limits of the request.

    Raises:
        Refused: the body is not JSON, or has wrong fields or texts.
    """
    texts, sources = _lists(_parsed(body), limits)
    if sources is not None and not parts:
        raise Refused(422, "sources: the model reads none; leave them out")
    if sources is not None and len(sources) != len(texts):
        raise Refused(422, f"sources: {len(sources)} for {len(texts)} texts; give one for each")
    rows = []
    for i, text in enumerate(texts):
        own = _fields(text, f"texts[{i}]", fields, limits)
        given = None if sources is None else sources[i]
        source = None if given is None else _fields(given, f"sources[{i}]", parts, limits)
        rows.append(Row(own, source))
    return rows


def _parsed(body: bytes) -> Any:
    try:
        return json.loads(body)
    except UnicodeDecodeError:
        raise Refused(400, "the body is not JSON: it is not UTF-8") from None
    except RecursionError:
        raise Refused(400, "the body is JSON that is nested too deeply") from None
    except ValueError as error:
        raise Refused(400, f"the body is not JSON: {first_line(error)}") from None


def _lists(given: Any, limits: Limits) -> tuple[list[Any], list[Any] | None]:
    """Return texts and sources of a parsed body."""
    form = 'send {"texts": [...]}, and "sources": [...] if you have them'
    if not isinstance(given, dict):
        raise Refused(422, f"the body is no object; {form}")
    if unknown := [name for name in given if name not in KEYS]:
        raise Refused(422, f"{unknown[0][:60]!r}: there is no such field; {form}")
    texts, sources = given.get("texts"), given.get("sources")
    if not isinstance(texts, list) or not texts:
        raise Refused(422, f"texts: must be a list with one text or more; {form}")
    if len(texts) > limits.texts:
        raise Refused(413, f"texts: {len(texts):,} of them; a request has {limits.texts:,} at most")
    if not isinstance(sources, list | None):
        raise Refused(422, "sources: must be a list, with null for each that is to be made")
    return texts, sources


def _fields(text: Any, place: str, fields: Sequence[str], limits: Limits) -> tuple[str, ...]:
    """Return the fields of a text: a string, or an object if there are several."""
    if len(fields) == 1 and not isinstance(text, dict):
        text = {fields[0]: text}
    if not isinstance(text, dict) or text.keys() != set(fields):
        example = ", ".join(f'"{name}": "..."' for name in fields)
        raise Refused(422, f"{place}: must be {{{example}}}")
    if problem := text_problem({name: text[name] for name in fields}):
        raise Refused(422, f"{place}: {problem}")
    if max(map(len, text.values())) > limits.length:
        raise Refused(413, f"{place}: has more than {limits.length:,} characters")
    return tuple(text[name] for name in fields)
