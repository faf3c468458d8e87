"""What a notebook shows: cells run by a real kernel, and what is in their outputs."""

import json

import narrow_client
import pytest
from misbehaving import EVENTS, JOB, MODEL, PLAN, answer, event
from narrow_client import _notebook, models

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")
pytest.importorskip("ipykernel")


def stream(handler):
    handler.send_response(200)
    handler.send_header("content-type", "text/event-stream")
    handler.send_header("connection", "close")
    handler.end_headers()
    told = [
        event(1) | {"kind": "started"},
        event(2) | {"data": {"done": 1, "total": 4, "loss": 2.5}},
        event(3) | {"kind": "notice", "message": "<script>alert(1)</script>\x1b[31m"},
        event(4) | {"kind": "finished", "data": {"seconds": 61.0}},
        event(5) | {"kind": "state", "phase": "", "message": "failed", "data": {"status": "failed"}},
    ]
    for item in told:
        handler.wfile.write(f"id: {item['seq']}\ndata: {json.dumps(item)}\n\n".encode())
    handler.wfile.write(b"event: end\ndata: {}\n\n")


def test_a_cell_shows_progress_as_one_display_and_jobs_and_plans_as_tables(uploads, local, tmp_path):
    failed = {**JOB, "status": "failed", "error": {"code": "x", "message": "<b>bold</b>"}}
    uploads.script |= {EVENTS: [stream], f"/jobs/{JOB['id']}": [answer(failed)], "/plans": [answer(PLAN)]}
    _, base, _, target = local
    cells = [
        f"import narrow_client\ntry:\n    narrow_client.compress({str(base)!r}, {str(target)!r}, out={str(tmp_path / 'o')!r})\n"
        "except narrow_client.JobFailed:\n    pass",
        f"client = narrow_client.Narrow()\nclient.jobs.get({JOB['id']!r})",
        f"client.plan({JOB['spec']!r})",
    ]
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in cells])
    nbclient.NotebookClient(book, timeout=120, kernel_name="python3").execute()
    (shown,) = book.cells[0].outputs
    page = shown["data"]["text/html"]
    assert page.count("<progress") == 1
    for words in ("read model and data", 'value="1" max="1"', "0:01:01", "&lt;script&gt;", f"narrow watch {JOB['id']}"):
        assert words in page
    assert "<script" not in page
    assert "\x1b" not in page
    job, plan = (cell.outputs[0]["data"]["text/html"] for cell in book.cells[1:])
    assert (f"Job {JOB['id']}" in job, "&lt;b&gt;bold" in job, "<b>bold" in job) == (True, True, False)
    assert "What would come out" in plan
    assert "Rounded." in plan


def test_what_has_no_short_form_has_none():
    assert models.Model.model_validate(MODEL)._repr_html_() is None


def test_a_terminal_is_no_notebook():
    assert not _notebook.in_notebook()


def test_errors_of_the_client_are_not_hidden_by_the_display(uploads, local, tmp_path):
    def wrong(event):
        raise RuntimeError("mine")

    uploads.script |= {EVENTS: [stream]}
    with pytest.raises(RuntimeError, match="mine"):
        narrow_client.compress(local[1], local[3], out=tmp_path / "o", progress=wrong)
