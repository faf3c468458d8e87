"""Which calls of the client are sent again, when, and what is then there: on a real socket, of both twins."""

import asyncio
import contextlib
import json
import pickle
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from types import SimpleNamespace

import narrow_client
import pytest
from misbehaving import DATASET, FILES, JOB, answer, artifacts, file, hang_up, problem
from narrow_client import _transport

PATH = f"/jobs/{JOB['id']}"


@pytest.fixture
def waits(monkeypatch):
    """What the client would have waited, which it does not."""
    found = []

    async def sleep(seconds):
        found.append(seconds)

    monkeypatch.setattr(_transport, "time", SimpleNamespace(sleep=found.append, monotonic=time.monotonic))
    monkeypatch.setattr(_transport, "asyncio", SimpleNamespace(sleep=sleep, to_thread=asyncio.to_thread))
    return found


@pytest.fixture(params=["sync", "async"])
def ask(request):
    """Makes one call of either client: `ask(lambda client: client.jobs.get(...))`."""

    async def ask_async(call, options):
        async with narrow_client.AsyncNarrow(**options) as client:
            return await call(client)

    def ask_sync(call, options):
        with narrow_client.Narrow(**options) as client:
            return call(client)

    return lambda call, **options: asyncio.run(ask_async(call, options)) if request.param == "async" else ask_sync(call, options)


def test_a_job_that_is_still_being_made_is_asked_for_again_with_its_key(server, ask, waits):
    server.script["/jobs"] = [hang_up, problem(409, "request_in_progress", "x"), problem(429, "x", "x"), answer(JOB, 201)]
    assert ask(lambda client: client.jobs.create(JOB["spec"])).id == JOB["id"]
    assert len({headers["Idempotency-Key"] for _, _, headers in server.asked}) == 1
    assert (len(server.asked), len(waits)) == (4, 3)


def test_other_conflicts_are_told_at_once(server, ask, waits):
    server.script[PATH + "/cancel"] = [problem(409, "job_finished", "It has ended.")]
    with pytest.raises(narrow_client.Conflict, match="It has ended"):
        ask(lambda client: client.jobs.cancel(JOB["id"]))
    assert (len(server.asked), waits) == (1, [])


def test_what_is_asked_to_wait_for_is_waited_for_up_to_a_minute(server, ask, waits):
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)
    server.script[PATH] = [
        *(problem(429, "x", "x", retry_after=asked) for asked in ("7", soon, "nonsense")),
        answer(JOB),
    ]
    ask(lambda client: client.jobs.get(JOB["id"]))
    assert waits[0] == 7
    assert 25 < waits[1] <= 30
    assert waits[2] <= 8
    server.asked.clear()
    server.script[PATH] = [problem(429, "quota", "Tomorrow.", retry_after="3600")]
    with pytest.raises(narrow_client.TooManyRequests, match="Tomorrow") as raised:
        ask(lambda client: client.jobs.get(JOB["id"]))
    assert (raised.value.retry_after, len(server.asked)) == (3600, 1)


def test_waits_grow_and_are_not_all_the_same(server, ask, waits):
    server.script[PATH] = [problem(503, "x", "x")]
    with pytest.raises(narrow_client.ServerError):
        ask(lambda client: client.jobs.get(JOB["id"]), max_retries=6)
    assert len(server.asked) == 7
    assert all(0.75 * most <= wait <= 1.25 * most for wait, most in zip(waits, (0.25, 0.5, 1, 2, 4, 8), strict=True))
    assert len({round(wait / most, 6) for wait, most in zip(waits, (0.25, 0.5, 1, 2, 4, 8), strict=True)}) > 1


def test_no_retries_are_none(server, ask, waits):
    server.script[PATH] = [hang_up]
    with pytest.raises(narrow_client.ConnectionFailed):
        ask(lambda client: client.jobs.get(JOB["id"]), max_retries=0)
    assert (len(server.asked), waits) == (1, [])


def test_what_is_not_safe_is_sent_again_only_if_it_was_refused(server, ask, waits, tmp_path):
    (tmp_path / "text.txt").write_text("text")

    def upload(client):
        return client.datasets.upload(tmp_path / "text.txt")

    server.script["/datasets"] = [problem(429, "x", "x"), problem(408, "x", "x"), answer(DATASET, 201)]
    assert ask(upload).id == DATASET["id"]
    for unknown, error in ((hang_up, narrow_client.ConnectionFailed), (problem(503, "x", "x"), narrow_client.ServerError)):
        server.asked.clear()
        server.script["/datasets"] = [unknown, answer(DATASET, 201)]
        with pytest.raises(error):
            ask(upload)
        assert len(server.asked) == 1, "it may have been made"


def test_a_delete_whose_answer_was_lost_is_done(server, ask, waits):
    server.script[PATH] = [hang_up, problem(404, "job_not_found", "x")]
    assert ask(lambda client: client.jobs.delete(JOB["id"])) is None
    with pytest.raises(narrow_client.NotFound):
        ask(lambda client: client.jobs.delete(JOB["id"]))


def test_silence_is_a_failure_and_slowness_is_none(server, ask, waits):
    def never(handler):
        time.sleep(0.6)
        hang_up(handler)

    def slow(handler):
        raw = json.dumps(JOB).encode()
        handler.send_response(200)
        handler.send_header("content-length", str(len(raw)))
        handler.end_headers()
        for part in (raw[:10], raw[10:20], raw[20:30], raw[30:]):
            time.sleep(0.15)
            handler.wfile.write(part)
            handler.wfile.flush()

    server.script[PATH] = [never, slow]
    assert ask(lambda client: client.jobs.get(JOB["id"]), timeout=0.4).id == JOB["id"]
    assert len(server.asked) == 2
    server.script[PATH] = [never]
    with pytest.raises(narrow_client.ConnectionFailed, match="time"):
        ask(lambda client: client.jobs.get(JOB["id"]), timeout=0.2, max_retries=0)


def test_a_service_that_is_not_ready_is_told_at_once_and_why(server, ask, waits):
    server.script["/readyz"] = [answer({"status": "unavailable", "version": "1", "checks": {"disk": "only 3 MiB free"}}, 503)]
    with pytest.raises(narrow_client.ServerError, match="disk: only 3 MiB free"):
        ask(lambda client: client.ready())
    server.script["/readyz"] = [answer(b"<html>", 503)]
    with pytest.raises(narrow_client.ServerError, match="HTTP 503"):
        ask(lambda client: client.ready())
    assert len(server.asked) == 2


def test_waiting_for_a_job_outlasts_a_restart_of_the_service(server, ask, waits):
    away = [problem(503, "x", "x")] * 7
    server.script[PATH] = [answer({**JOB, "status": "running"}), *away, answer(JOB)]
    assert ask(lambda client: client.jobs.wait(JOB["id"])).status == "succeeded"
    assert len(server.asked) == 9


def test_a_download_goes_on_for_as_long_as_bytes_come(server, waits, tmp_path):
    server.script[FILES] = [artifacts()]
    server.script[FILES + "/model/w.bin"] = [problem(429, "x", "x", retry_after="3"), file]
    with narrow_client.Narrow() as client:
        client.jobs.download(JOB["id"], tmp_path)
    assert waits == [3]


def test_lists_are_fetched_page_by_page_and_as_often_as_they_are_looked_at(server):
    server.script["/jobs"] = [
        answer({"data": [JOB] * 2, "next_cursor": "job_2"}),
        answer({"data": [JOB], "next_cursor": None}),
    ] * 2
    with narrow_client.Narrow() as client:
        jobs = client.jobs.list()
        assert not server.asked
        assert next(iter(jobs)).id == JOB["id"]
        assert len(server.asked) == 1, "the next page is fetched when it is needed"
        server.script["/jobs"] = [
            answer({"data": [JOB] * 2, "next_cursor": "job_2"}),
            answer({"data": [JOB], "next_cursor": None}),
        ]
        assert [len(page.data) for page in jobs.pages()] == [2, 1]
        server.script["/jobs"] = [answer({"data": [JOB], "next_cursor": None})]
        assert len(list(client.jobs.list(cursor="job_2"))) == 1

    async def pages():
        async with narrow_client.AsyncNarrow() as client:
            return [len(page.data) async for page in client.jobs.list().pages()]

    server.script["/jobs"] = [answer({"data": [JOB] * 2, "next_cursor": "job_2"}), answer({"data": [JOB], "next_cursor": None})]
    assert asyncio.run(pages()) == [2, 1]


def test_the_client_says_who_it_is_and_its_errors_hold_no_key(server, monkeypatch):
    server.script["/jobs"] = [problem(401, "key_unknown", "No.")]
    monkeypatch.setenv("NARROW_API_KEY", "nrw_secret")
    with narrow_client.Narrow() as client, pytest.raises(narrow_client.NotAllowed) as raised:
        list(client.jobs.list())
    _, _, headers = server.asked[0]
    assert headers["User-Agent"].startswith("narrow-client/")
    assert headers["Authorization"] == "Bearer nrw_secret"
    error = raised.value
    assert repr(error) == "NotAllowed(status=401, code='key_unknown', request_id='req_1'): No."
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), again.code, str(again)) == (type(error), error.code, str(error))
    with contextlib.closing(client):
        assert "nrw_secret" not in repr(client) + repr(vars(client))


def test_a_new_key_is_in_no_repr():
    key = {"id": "key_1", "name": "n", "role": "read", "tenant": "default", "hint": "cret", "key": "nrw_secret"}
    times = {"created_at": "2026-01-01T00:00:00Z", "expires_at": None, "revoked_at": None, "used_at": None}
    found = narrow_client.models.SecretKey.model_validate({**key, **times})
    assert found.key == "nrw_secret"
    assert "nrw_secret" not in repr(found) + str(found)
