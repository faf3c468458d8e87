"""Sweeps over a real service: points share their first stages, outlive a kill, and make a frontier."""

import asyncio
import time

import narrow_client
import pytest
from live import QUICK, SLOW, running
from test_service import problem

TERMINAL = ("succeeded", "failed", "cancelled")
SHARED = {"load", "measure_base", "score"}


def sweep_of(service, model, data, **changes):
    return {
        "base": {"model": service.upload_model(model)},
        "target": {"dataset": service.upload_dataset(data)},
        "methods": {"default": QUICK, "by norm": {**QUICK, "importance": "magnitude"}},
        "budgets": [{"parameters": 0.85}, {"parameters": 0.8}],
        "block_tokens": 64,
        "skill_tokens": 1024,
        **changes,
    }


def wait(service, sweep_id, condition, seconds=280):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        sweep = service.http.get(f"/sweeps/{sweep_id}").json()
        if condition(sweep):
            return sweep
        time.sleep(0.1)
    raise AssertionError(f"still {sweep}")


def statuses(sweep):
    return [point["status"] for point in sweep["points"]]


@pytest.mark.slow
def test_a_sweep_outlives_a_kill_and_runs_every_point_once(tmp_path, tiny_folder, python_file):
    data = tmp_path / "data"
    with running(data) as service:
        answer = service.http.post("/sweeps", json=sweep_of(service, tiny_folder, python_file))
        assert answer.status_code == 201, answer.text
        made = answer.json()
        assert answer.headers["location"] == f"/sweeps/{made['id']}"
        assert [(p["method"], p["budget"]["parameters"], p["seed"]) for p in made["points"]] == [
            ("default", 0.85, 0),
            ("default", 0.8, 0),
            ("by norm", 0.85, 0),
            ("by norm", 0.8, 0),
        ]
        wait(service, made["id"], lambda s: statuses(s)[:2] == ["succeeded", "running"])
        half = service.http.get(f"/sweeps/{made['id']}/frontier").json()
        assert (half["finished"], half["of"], len(half["points"])) == (1, 4, 1)
        service.wait(made["points"][1]["job"], lambda j: j["phase"] in ("allocate", "plan", "slice", "reconstruct", "recover"))
        service.process.kill()
        service.process.wait()
    with running(data) as service:
        sweep = wait(service, made["id"], lambda s: s["finished"])
        assert sweep["counts"] == {"succeeded": 4}
        jobs = [service.job(point["job"]) for point in sweep["points"]]
        assert [job["attempt"] for job in jobs] == [1, 2, 1, 1], "nothing that was finished has run again"
        for job, reused in zip(jobs, (set(), SHARED, {"load", "measure_base"}, SHARED), strict=True):
            events = service.events(job["id"])
            assert [e["seq"] for e in events] == list(range(1, len(events) + 1))
            first = [e for e in events if e["kind"] == "finished" and e["message"] == "done by another run"]
            assert {e["phase"] for e in first} == reused
            assert not reused & {e["phase"] for e in events if e["kind"] == "started"}

        frontier = service.http.get(f"/sweeps/{made['id']}/frontier").json()
        assert (frontier["target"], frontier["finished"], frontier["of"]) == ("python", 4, 4)
        assert [p["parameters"]["mean"] for p in frontier["points"]] == sorted(
            p["parameters"]["mean"] for p in frontier["points"]
        )
        for point in frontier["points"]:
            same = [p for p in sweep["points"] if p["method"] == point["method"] and p["budget"] == point["budget"]]
            report = service.http.get(f"/jobs/{same[0]['job']}/report").json()
            assert point["loss"]["mean"] == report["skills"]["python"]["recovered"]["loss"] == same[0]["figures"]["loss"]
            assert point["parameters"]["mean"] == report["after"]["parameters"]
            size, loss = point["parameters"]["mean"], point["loss"]["mean"]
            beaten = [o for o in frontier["points"] if o["parameters"]["mean"] <= size and o["loss"]["mean"] < loss]
            assert point["dominated"] == bool(beaten)
        assert [curve["points"][-1]["tokens"] for curve in frontier["curves"]] == [1024] * 4
        page = service.http.get(f"/sweeps/{made['id']}/frontier", headers={"accept": "text/html"})
        assert page.headers["content-type"].startswith("text/html")
        assert page.text.count("<svg") == 2
        assert "script-src" not in page.headers["content-security-policy"]

        listed = service.http.get("/jobs", params={"sweep": made["id"]}).json()["data"]
        assert [job["id"] for job in listed] == [job["id"] for job in reversed(jobs)]
        assert {job["sweep"] for job in listed} == {made["id"]}
        problem(service.http.post(f"/sweeps/{made['id']}/cancel"), 409, "sweep_finished")
        assert service.http.delete(f"/sweeps/{made['id']}").status_code == 204
        problem(service.http.get(f"/sweeps/{made['id']}"), 404, "sweep_not_found")
        problem(service.http.get(f"/jobs/{jobs[0]['id']}"), 404, "job_not_found")
        assert not [p for p in (data / "artifacts").rglob("*") if p.is_file() and p.name != ".lock"]
        assert service.http.get(f"/models/{jobs[0]['result_model']}").status_code == 200


@pytest.fixture(scope="module")
def queueing(tmp_path_factory):
    """A service without workers."""
    with running(tmp_path_factory.mktemp("queueing") / "data", workers=0) as found:
        yield found


@pytest.fixture(scope="module")
def spec(queueing, tiny_folder, python_file):
    return sweep_of(queueing, tiny_folder, python_file)


def test_what_is_wrong_with_a_sweep_is_told(queueing, spec):
    def post(**changes):
        return queueing.http.post("/sweeps", json={**spec, **changes})

    tenths = [{"parameters": n / 10} for n in range(1, 11)]
    problem(post(methods={}), 422, "invalid_request", "methods should have at least 1 item")
    problem(post(budgets=[]), 422, "invalid_request", "budgets should have at least 1 item")
    problem(
        post(budgets=tenths, seeds=list(range(10)), methods={"a": {}, "b": {}, "c": {}}), 422, "invalid_request", "300 points"
    )
    problem(post(methods={"$x$": {}}), 422, "invalid_request", "methods.$x$ is not a name")
    problem(post(methods={"a": {"kind": "bake"}}), 422, "invalid_request", "methods.a.kind should be")
    problem(post(seeds=[1, 1]), 422, "invalid_request", "'seeds' has 1 twice")
    problem(post(budgets=[*spec["budgets"], {"parameters": 0.01}]), 422, "budget_too_small", "'default' with the budget")
    problem(post(budgets=[{"keep": {"head": 0.5}}]), 422, "invalid_request", "which is not among 'method.units'")
    problem(post(broad=spec["target"]), 422, "invalid_request", "no method has one")
    problem(post(target={"dataset": "ds_0000000000000000"}), 404, "dataset_not_found")
    problem(post(base={"model": "mdl_0000000000000000"}), 404, "model_not_found")
    problem(queueing.http.get("/sweeps/swp_nothing/frontier"), 404, "sweep_not_found")
    assert queueing.http.get("/sweeps").json()["data"] == []
    assert queueing.http.get("/jobs").json()["data"] == [], "a sweep is made whole or not at all"


def test_a_key_makes_one_sweep_and_no_job(queueing, spec):
    key = {"Idempotency-Key": "sweep-1"}
    one = queueing.http.post("/sweeps", json=spec, headers=key)
    two = queueing.http.post("/sweeps", json=spec, headers=key)
    assert (one.status_code, one.json()) == (201, two.json())
    problem(queueing.http.post("/sweeps", json={**spec, "seeds": [5]}, headers=key), 422, "idempotency_key_reused")
    job = {name: spec[name] for name in ("base", "target", "block_tokens")} | {"budget": {"parameters": 0.85}}
    problem(queueing.http.post("/jobs", json=job, headers=key), 422, "idempotency_key_reused")
    assert len(queueing.http.get("/jobs", params={"sweep": one.json()["id"]}).json()["data"]) == 4


def test_a_queued_sweep_is_listed_cancelled_and_deleted(queueing, spec):
    ids = [queueing.http.post("/sweeps", json={**spec, "seeds": [seed]}).json()["id"] for seed in (1, 2)]
    page = queueing.http.get("/sweeps", params={"limit": 1}).json()
    assert [sweep["id"] for sweep in page["data"]] == [ids[1]]
    page = queueing.http.get("/sweeps", params={"limit": 1, "cursor": page["next_cursor"]}).json()
    assert [(sweep["id"], sweep["counts"], sweep["finished"]) for sweep in page["data"]] == [(ids[0], {"queued": 4}, False)]
    empty = queueing.http.get(f"/sweeps/{ids[0]}/frontier").json()
    assert (empty["finished"], empty["of"], empty["points"]) == (0, 4, [])
    page = queueing.http.get(f"/sweeps/{ids[0]}/frontier", headers={"accept": "text/html"})
    assert "No point of this sweep has finished yet." in page.text

    problem(queueing.http.delete(f"/sweeps/{ids[0]}"), 409, "sweep_not_finished", "4 points")
    for _ in range(2):
        cancelled = queueing.http.post(f"/sweeps/{ids[0]}/cancel").json()
        assert (cancelled["counts"], cancelled["finished"]) == ({"cancelled": 4}, True)
    assert queueing.http.get(f"/sweeps/{ids[1]}").json()["counts"] == {"queued": 4}
    assert queueing.http.delete(f"/sweeps/{ids[0]}").status_code == 204
    problem(queueing.http.delete(f"/sweeps/{ids[0]}"), 404, "sweep_not_found")


def test_both_clients_do_the_same(queueing, spec):
    async def twin():
        async with narrow_client.AsyncNarrow(queueing.url) as client:
            made = await client.sweeps.create({**spec, "seeds": [7]})
            assert made.id in [sweep.id async for sweep in client.sweeps.list()]
            assert len([job async for job in client.jobs.list(sweep=made.id)]) == 4
            with pytest.raises(narrow_client.JobTimeout, match="it goes on"):
                await client.sweeps.wait(made.id, timeout=0)
            assert (await client.sweeps.frontier(made.id)).of == 4
            assert "<h1>" in await client.sweeps.frontier_page(made.id)
            await client.sweeps.cancel(made.id)
            assert (await client.sweeps.wait(made.id)).finished
            await client.sweeps.delete(made.id)
            return made

    there = asyncio.run(twin())
    with narrow_client.Narrow(queueing.url) as client:
        with pytest.raises(narrow_client.NotFound):
            client.sweeps.get(there.id)
        made = client.sweeps.create({**spec, "seeds": [7]}, "key-7")
        assert client.sweeps.create({**spec, "seeds": [7]}, "key-7") == made
        assert next(iter(client.sweeps.list())).id == made.id
        assert [job.sweep for job in client.jobs.list(sweep=made.id)] == [made.id] * 4
        with pytest.raises(narrow_client.JobTimeout, match="it goes on"):
            client.sweeps.wait(made.id, timeout=0)
        assert (client.sweeps.frontier(made.id).of, "<h1>" in client.sweeps.frontier_page(made.id)) == (4, True)
        client.sweeps.cancel(made.id)
        assert client.sweeps.wait(made.id).counts == {"cancelled": 4}
        client.sweeps.delete(made.id)


def test_a_running_sweep_is_cancelled_soon(service, tiny_folder, python_file):
    spec = sweep_of(service, tiny_folder, python_file, methods={"slow": SLOW})
    sweep = service.http.post("/sweeps", json=spec).json()
    service.wait(sweep["points"][0]["job"], lambda j: j["status"] == "running")
    asked = time.monotonic()
    assert service.http.post(f"/sweeps/{sweep['id']}/cancel").json()["counts"] == {"cancelling": 1, "cancelled": 1}
    wait(service, sweep["id"], lambda s: s["counts"] == {"cancelled": 2}, 20)
    assert time.monotonic() - asked < 8
    assert not service.children("narrow_engine")
