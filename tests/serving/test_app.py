"""The server: answers, common batches, limits, access, and hostile requests."""

import asyncio
import json
import re
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import httpx
import processes
import pytest
from fastapi.testclient import TestClient

import flare_exp
from flare_exp.data.rows import Row
from flare_exp.errors import UserError
from flare_exp.experiment.predicting import Result
from flare_exp.experiment.source_texts import SourceTexts
from flare_exp.experiment.translating import UnknownText
from flare_exp.serving.app import Access, make_app
from flare_exp.serving.batching import Batcher
from flare_exp.serving.requests import Limits, Refused, rows_of

LIMITS = Limits(body=2000, texts=20, length=100, seconds=5.0, waiting=30)
LOCAL = Access(hosts=("127.0.0.1",))
URL = "http://127.0.0.1"


class Upper:
    """A run whose label is the text itself in upper case, and whose source is the reverse."""

    reads_sources, sources = True, SourceTexts(("text",), ("en",), "en")
    task = SimpleNamespace(name="letters", fields=("text",), labels=("A", "B"))
    run = SimpleNamespace(
        cfg=SimpleNamespace(
            data=SimpleNamespace(batch_size=4),
            task=SimpleNamespace(lang="far"),
            model=SimpleNamespace(name="m"),
            method=SimpleNamespace(name="flare"),
        )
    )

    def stream(self, texts, sources):
        for (text,), source in zip(texts, sources, strict=True):
            if text == "unknown":
                raise UnknownText("mt=toy knows no 'unknown'")
            if text == "broken":
                raise RuntimeError("/secret/place: weights are gone")
            if text == "no translator":
                raise UserError("mt.command=/secret/place: there is no such program")
            yield Result(text.upper(), {"A": 0.25, "B": 0.75}, source or (text[::-1],), None, False)


@pytest.fixture(scope="module")
def client():
    with TestClient(make_app(Upper(), LIMITS, LOCAL), base_url=URL) as made:
        yield made


def post(client, content, **headers):
    kind = {"content-type": "application/json"}
    return client.post("/predict", content=content, headers={**kind, **headers})


def test_answers_are_in_the_order_of_the_texts(client):
    asked = {"texts": ["b", "a", "c"], "sources": [None, "x", None]}
    found = client.post("/predict", json=asked).json()["predictions"]
    assert [one["prediction"] for one in found] == ["B", "A", "C"]
    assert [one["source"] for one in found] == ["b", "x", "c"]
    assert found[0] == {
        "prediction": "B",
        "probability": 0.75,
        "probabilities": {"A": 0.25, "B": 0.75},
        "cut": False,
        "source": "b",
    }


HOSTILE = {
    "not JSON": (b"texts=a", 400),
    "empty": (b"", 400),
    "binary": (bytes(range(256)), 400),
    "half": (b'{"texts": ["a"', 400),
    "not UTF-8": (b'{"texts": ["\xff"]}', 400),
    "nested": (b"[" * 1900, 400),
    "a huge number": (b'{"texts": ' + b"9" * 1900 + b"}", 422),
    "a list": (b'["a"]', 422),
    "null": (b"null", 422),
    "no texts": (b"{}", 422),
    "a text alone": (b'{"texts": "a"}', 422),
    "an empty list": (b'{"texts": []}', 422),
    "another field": (b'{"texts": ["a"], "model": "/etc/passwd"}', 422),
    "a number": (b'{"texts": ["a", 5]}', 422),
    "a list in the list": (b'{"texts": [["a"]]}', 422),
    "a blank text": (b'{"texts": [" \\n"]}', 422),
    "half a surrogate pair": (b'{"texts": ["\\ud800"]}', 422),
    "fewer sources": (b'{"texts": ["a", "b"], "sources": ["a"]}', 422),
    "sources are text": (b'{"texts": ["a"], "sources": "a"}', 422),
    "not translated": (b'{"texts": ["a", "unknown"]}', 422),
    "too many texts": (json.dumps({"texts": ["a"] * 21}).encode(), 413),
    "a long text": (json.dumps({"texts": ["a" * 101]}).encode(), 413),
    "10,000 texts": (json.dumps({"texts": ["a"] * 10_000}).encode(), 413),
    "a broken model": (b'{"texts": ["broken"]}', 500),
    "a lost translator": (b'{"texts": ["a", "no translator"]}', 500),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_request_gets_one_error_and_shows_nothing_of_the_inside(client, name):
    body, status = HOSTILE[name]
    answer = post(client, body)
    assert answer.status_code == status
    assert list(answer.json()) == ["error"]
    (said,) = answer.json()["error"].splitlines()
    assert 10 < len(said) < 300
    for inside in ("Traceback", "flare_exp", "secret", ".py", "site-packages"):
        assert inside not in said
    assert post(client, b'{"texts": ["a"]}').status_code == 200, "the server goes on"


def test_sources_in_several_languages_are_one_object_for_each_text():
    parts = SourceTexts(("text",), ("en", "near"), "en").parts
    body = {"texts": ["a", "b"], "sources": [{"near": "d", "en": "c"}, None]}
    rows = rows_of(json.dumps(body).encode(), ("text",), parts, LIMITS)
    assert rows == [Row(("a",), ("c", "d")), Row(("b",))]
    with pytest.raises(Refused, match=r'sources\[0\]: must be {"en": "...", "near": "..."}'):
        rows_of(b'{"texts": ["a"], "sources": ["c"]}', ("text",), parts, LIMITS)


def test_a_body_is_not_read_beyond_its_limit(client):
    sent = []

    def endless():
        while len(sent) < 1000:
            sent.append(b"x" * 100)
            yield sent[-1]

    assert post(client, endless()).status_code == 413
    announced = post(client, b"{}", **{"content-length": "9999999"})
    assert announced.status_code == 413


def test_other_paths_methods_types_and_names_are_refused_as_json(client):
    for answer, status in (
        (client.get("/predict"), 405),
        (client.get("/../../etc/passwd"), 404),
        (client.post("/predict", content=b"{}", headers={"content-type": "text/plain"}), 415),
        (client.get("/health", headers={"host": "evil.example"}), 421),
        (client.get("/", headers={"host": "evil.example"}), 421),
    ):
        assert answer.status_code == status
        assert list(answer.json()) == ["error"]


def test_a_token_is_asked_for_where_texts_or_counts_are():
    with TestClient(make_app(Upper(), LIMITS, Access("s3cret")), base_url=URL) as client:
        body = b'{"texts": ["a"]}'
        for wrong in ({}, {"authorization": "Bearer s3cre"}, {"authorization": "s3cret"}):
            answer = post(client, body, **wrong)
            assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
            assert client.get("/metrics", headers=wrong).status_code == 401
        assert post(client, body, authorization="Bearer s3cret").status_code == 200
        assert client.get("/health").json()["needs_token"] is True
        assert "s3cret" not in client.get("/health").text


def test_health_metrics_and_the_page(client):
    health = client.get("/health").json()
    assert (health["status"], health["fields"], health["labels"]) == ("ok", ["text"], ["A", "B"])
    post(client, b'{"texts": ["a", "b", "c", "d", "e"]}')
    lines = client.get("/metrics").text.splitlines()
    assert 'flare_requests_total{status="200"} ' in "\n".join(lines)
    assert "flare_waiting_texts 0.0" in lines
    page = client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "http" not in page.text.partition("<style>")[2], "it loads nothing from elsewhere"


def test_what_comes_while_the_model_works_is_one_batch():
    sizes, begun, go_on = [], threading.Event(), threading.Event()

    def predict(rows):
        begun.set()
        assert go_on.wait(10)
        return [row.texts[0].upper() for row in rows]

    async def ask():
        batcher = Batcher(predict, 4, 30, sizes.append)
        working = asyncio.create_task(batcher.work())
        first = asyncio.create_task(batcher.ask([Row(("a",))]))
        await asyncio.to_thread(begun.wait, 10)
        others = [asyncio.create_task(batcher.ask([Row((x,)), Row((x + x,))])) for x in "bcdef"]
        given_up = others.pop()
        await asyncio.sleep(0)
        given_up.cancel()
        await asyncio.sleep(0)
        go_on.set()
        found = [*await asyncio.gather(first, *others), await batcher.ask([Row(("g",))])]
        working.cancel()
        return found

    assert asyncio.run(ask()) == [["A"], *([x, x + x] for x in "BCDE"), ["G"]]
    assert sizes == [1, 4, 4, 1], "nothing is computed for who has given up"


def test_a_text_that_cannot_be_translated_fails_alone(client):
    def send(text):
        return post(client, json.dumps({"texts": [text]}).encode()).status_code

    found = {}
    threads = [
        threading.Thread(target=lambda i=i, t=t: found.update({i: send(t)}))
        for i, t in enumerate(["a", "unknown", "b", "unknown", "c"] * 2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[i] for i in range(10)] == [200, 422, 200, 422, 200] * 2


@pytest.mark.parametrize("error", [UnknownText, UserError])
def test_a_text_that_fails_takes_no_other_of_its_batch_along(error):
    def predict(rows):
        if any(row.source is None for row in rows):
            raise error("mt.command=apertium: there is no such program")
        return [row.texts[0].upper() for row in rows]

    async def ask():
        batcher = Batcher(predict, 4, 30, lambda _: None)
        rows = [Row(("a",), ("A",)), Row(("b",)), Row(("c",), ("C",))]
        asked = asyncio.gather(*(batcher.ask([row]) for row in rows), return_exceptions=True)
        working = asyncio.create_task(batcher.work())
        found = await asked
        working.cancel()
        return found

    first, failed, last = asyncio.run(ask())
    assert (first, last, type(failed)) == (["A"], ["C"], error)


def test_a_text_whose_request_was_given_up_is_not_tried_again():
    tried, begun, go_on = [], threading.Event(), threading.Event()

    def predict(rows):
        tried.append([row.texts[0] for row in rows])
        begun.set()
        assert go_on.wait(10)
        if len(rows) > 1:
            raise UserError("one of them is in the way")
        return [row.texts[0].upper() for row in rows]

    async def ask():
        batcher = Batcher(predict, 4, 30, lambda _: None)
        given_up, other = (asyncio.create_task(batcher.ask([Row((x,))])) for x in "ab")
        await asyncio.sleep(0)
        working = asyncio.create_task(batcher.work())
        await asyncio.to_thread(begun.wait, 10)
        given_up.cancel()
        await asyncio.sleep(0)
        go_on.set()
        found = await other
        working.cancel()
        return found

    assert asyncio.run(ask()) == ["B"]
    assert tried == [["a", "b"], ["b"]]


class Stuck(Upper):
    """A run whose model is not done in the time of any test."""

    def stream(self, texts, sources):
        while True:
            time.sleep(1)

    translator = SimpleNamespace(machine=None)

    def check_new_texts(self):
        pass


def serve_stuck():
    flare_exp.load = lambda *_: Stuck()


def stuck_server(*words):
    """A server whose model is not done in the time of any test, and its address."""
    given = [*processes.PROGRAM, "serve", "run=r", "port=0", *words]
    server = processes.Run(given, merged=True, before=serve_stuck)
    while not (found := re.search(r"at (http://\S+);", server.said)):
        assert server.alive(0.2), server.said
    return server, found[1]


@pytest.mark.slow
def test_a_signal_ends_a_server_whose_model_works_for_nobody():
    server, url = stuck_server("max_seconds=1")
    late = httpx.post(f"{url}/predict", json={"texts": ["a"]}, timeout=30)
    assert late.status_code == 504
    server.terminate()
    assert server.wait(30) == 0
    assert server.said.endswith("ended; every request that was accepted is answered\n")


@pytest.mark.slow
def test_a_second_signal_cuts_requests_off_and_says_so():
    server, url = stuck_server()
    with ThreadPoolExecutor() as pool:
        asked = pool.submit(httpx.post, f"{url}/predict", json={"texts": ["a"]}, timeout=60)
        while "flare_waiting" not in httpx.get(f"{url}/metrics").text:
            pass
        time.sleep(0.5)
        for _ in range(2):
            server.send_signal(signal.SIGINT)
            time.sleep(1)
        cut = asked.result()
    assert (cut.status_code, cut.json()) == (503, {"error": "the server ends; ask again later"})
    assert server.wait(30) == 0
    _, *said = server.said.splitlines()
    assert said == ["ended; requests that it cut off: 1"]


def test_requests_beyond_the_limits_of_time_and_waiting_are_refused():
    class Slow(Upper):
        def stream(self, texts, sources):
            stop.wait(10)
            return super().stream(texts, sources)

    stop, limits = threading.Event(), Limits(texts=20, seconds=0.2, waiting=5)
    with TestClient(make_app(Slow(), limits, LOCAL), base_url=URL) as client:
        late = post(client, b'{"texts": ["a"]}')
        assert (late.status_code, list(late.json())) == (504, ["error"])
        many = post(client, json.dumps({"texts": ["a"] * 6}).encode())
        assert (many.status_code, many.headers["retry-after"]) == (503, "1")
        stop.set()
