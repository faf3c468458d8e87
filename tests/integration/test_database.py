"""What must hold of the database, of SQLite and of Postgres alike: old tables become new ones, nothing is claimed twice."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, timedelta, timezone
from email.utils import format_datetime
from pathlib import Path

import postgres
import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.ddl.impl import DefaultImpl
from alembic.migration import MigrationContext
from live import QUICK, running, spec_of
from sqlalchemy import inspect, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.schema import DropTable
from sqlmodel import SQLModel
from tiny import ROOT

from service import queue
from service.db.session import connect, migrate, open_session
from service.db.tables import ArtifactRow, IdempotencyRow, JobRow, new_id, now
from service.settings import Settings

needs_postgres = pytest.mark.skipif(postgres.BINARIES is None, reason="there is no Postgres on this machine")


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=needs_postgres)])
def settings(request, tmp_path) -> Settings:
    url = postgres.database_for(tmp_path) if request.param == "postgres" else ""
    found = Settings(data=tmp_path, database_url=url)
    found.prepare()
    return found


OLD_JOB = (
    "INSERT INTO job (id, status, spec, phase, attempt, last_seq, engine_seq, created_at) "
    "VALUES ('job_a', 'succeeded', '{}', '', 1, 0, 0, '2026-01-01')"
)


def first_tables(settings: Settings) -> None:
    """The database as the first version left it."""
    config = Config()
    config.set_main_option("script_location", str(ROOT / "service" / "db" / "migrations"))
    config.attributes["url"] = settings.database
    command.upgrade(config, "0001")


def job(**changes) -> JobRow:
    return JobRow(**{"id": new_id("job"), "status": "queued", "spec": {}, "created_at": now(), **changes})


def test_the_tables_of_the_first_version_become_those_of_today(settings):
    first_tables(settings)
    engine = connect(settings)
    with engine.begin() as old:
        old.execute(text(OLD_JOB))
        old.execute(text("INSERT INTO idempotency VALUES ('key', 'digest', 'job_a', '2026-01-01')"))
        old.execute(text("INSERT INTO artifact VALUES ('job_a', 'model.safetensors', 17, 'digest', 'text/plain')"))
    migrate(settings)
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), SQLModel.metadata) == []
    with open_session(engine) as session:
        assert session.get(JobRow, "job_a").sweep is None
        assert session.get(IdempotencyRow, ("default", "key")).job_id == "job_a"
        assert session.get(ArtifactRow, ("job_a", "model.safetensors")).bytes == 17
        session.delete(session.get(JobRow, "job_a"))
        session.commit()
        session.expire_all()
        assert session.get(IdempotencyRow, ("default", "key")) is None
        session.add(job(status="baked"))
        with pytest.raises(IntegrityError):
            session.commit()


def test_an_update_that_is_cut_off_leaves_the_tables_as_they_were(settings, monkeypatch):
    """All its steps are one transaction, in both databases."""
    first_tables(settings)
    engine = connect(settings)
    with engine.begin() as old:
        old.execute(text(OLD_JOB))
        old.execute(text("INSERT INTO idempotency VALUES ('key', 'digest', 'job_a', '2026-01-01')"))
    steps, run = [], DefaultImpl._exec

    def cut(self, *arguments, **options):
        steps.append(arguments)
        if isinstance(arguments[0], DropTable) and arguments[0].element.name == "idempotency_before":
            raise KeyboardInterrupt
        return run(self, *arguments, **options)

    monkeypatch.setattr(DefaultImpl, "_exec", cut)
    with pytest.raises(KeyboardInterrupt):
        migrate(settings)
    assert len(steps) > 10
    monkeypatch.undo()
    with engine.connect() as connection:
        assert connection.execute(text("SELECT version_num FROM alembic_version")).scalar() == "0001"
        tables = set(inspect(connection).get_table_names())
    assert not {"sweep", "api_key", "idempotency_before"} & tables
    migrate(settings)
    with open_session(engine) as session:
        assert session.get(IdempotencyRow, ("default", "key")) is not None


def test_processes_that_start_together_make_the_tables_once(settings, tmp_path):
    """Each with a data folder of its own, so that no file keeps them apart: on Postgres, as machines would."""
    if not settings.database_url:
        pytest.skip("SQLite is on one machine, where the folder is shared")
    places = [settings.model_copy(update={"data": tmp_path / str(n)}) for n in range(4)]
    for place in places:
        place.prepare()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(_migrate_in_a_process, places))
    with connect(settings).connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), SQLModel.metadata) == []


def _migrate_in_a_process(settings: Settings) -> None:
    import subprocess
    import sys

    code = "from service.db.session import migrate; from service.settings import Settings; migrate(Settings())"
    environment = {"NARROW_DATA": str(settings.data), "NARROW_DATABASE_URL": settings.database_url, "PATH": "/usr/bin:/bin"}
    subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, check=True, capture_output=True, timeout=120)


def test_a_file_may_have_more_bytes_than_32_bits_can_count(settings):
    migrate(settings)
    with open_session(connect(settings)) as session:
        row = job()
        session.add(row)
        session.flush()
        session.add(ArtifactRow(job_id=row.id, path="model.safetensors", bytes=2**40, sha256="0", media_type="text/plain"))
        session.commit()
        session.expire_all()
        assert session.get(ArtifactRow, (row.id, "model.safetensors")).bytes == 2**40


def test_many_workers_claim_each_job_once_and_oldest_first(settings):
    migrate(settings)
    engine = connect(settings)
    with open_session(engine) as session:
        wanted = sorted(new_id("job") for _ in range(40))
        session.add_all(job(id=identifier) for identifier in wanted)
        session.commit()
    claimed: list[list[str]] = [[] for _ in range(6)]
    barrier = threading.Barrier(6)

    def work(mine: list[str]) -> None:
        barrier.wait()
        while True:
            with open_session(engine) as session:
                found = queue.claim(session, 60, 3)
                if found is None:
                    return
                mine.append(found.id)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, claimed))
    assert sorted(identifier for mine in claimed for identifier in mine) == wanted
    for mine in claimed:
        assert mine == sorted(mine)


def test_times_come_back_as_they_went_and_in_utc(settings):
    """Not in another zone that is as far from Greenwich: what writes HTTP's dates refuses those."""
    migrate(settings)
    engine, made = connect(settings), now()
    with open_session(engine) as session:
        session.add(job(id="job_a", created_at=made.astimezone(timezone(timedelta(hours=2)))))
        session.commit()
    with open_session(engine) as session:
        found = session.get_one(JobRow, "job_a").created_at
    assert (found, found.tzinfo) == (made, UTC)
    assert format_datetime(found, usegmt=True).endswith("GMT")


def test_a_tenant_with_many_jobs_keeps_no_other_waiting(settings):
    """Those that have least running come first, and within a tenant the oldest."""
    migrate(settings)
    engine = connect(settings)
    order = ["many"] * 5 + ["few"] * 2 + ["one"]
    with open_session(engine) as session:
        session.add_all(job(id=f"job_{number}", tenant=tenant) for number, tenant in enumerate(order))
        session.add(job(id="job_x", tenant="gone", status="running", lease_token="x", lease_until=now() - timedelta(seconds=9)))
        session.commit()
        claimed = []
        while (found := queue.claim(session, 60, 3)) is not None:
            claimed.append(found.id)
    # One of each, those whose worker is gone among them; then the second ones, then what is left.
    assert claimed == ["job_0", "job_5", "job_7", "job_x", "job_1", "job_6", "job_2", "job_3", "job_4"]


def test_events_that_come_from_two_sides_are_numbered_without_gaps(settings):
    """A worker tells what the engine does while users cancel."""
    from narrow_engine.events import Event

    migrate(settings)
    engine = connect(settings)
    with open_session(engine) as session:
        session.add(job(id="job_a"))
        session.commit()
        held = queue.claim(session, 60, 3)
    told = [Event(seq=n, time=now(), kind="progress", phase="recover", message="", data={}) for n in range(1, 31)]

    def ingest() -> None:
        for event in told:
            with open_session(engine) as session:
                queue.ingest(session, "job_a", held.lease_token, [event])

    def cancel() -> None:
        for _ in range(30):
            with open_session(engine) as session:
                queue.cancel(session, "job_a")
                session.commit()

    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(ingest), pool.submit(cancel)]:
            done.result()
    with engine.connect() as connection:
        numbers = list(connection.execute(text("SELECT seq FROM event WHERE job_id = 'job_a' ORDER BY seq")).scalars())
        last = connection.execute(text("SELECT last_seq FROM job")).scalar()
    assert numbers == list(range(1, last + 1))
    assert last == 1 + 30 + 1  # running, what the engine told, and one cancelling of thirty


@needs_postgres
@pytest.mark.slow
def test_a_job_outlives_its_database(tmp_path, tiny_folder, python_file):
    """Postgres is killed while a job runs and comes back later: requests are told to come again, and the job ends as it would."""
    data: Path = tmp_path / "data"
    url = postgres.database_for(data)
    with running(data, NARROW_DATABASE_URL=url, NARROW_LEASE_SECONDS="30") as service:
        method = {**QUICK, "recover": {"tokens": 20_000, "batch_tokens": 256}}
        job_id = service.http.post("/jobs", json=spec_of(service, tiny_folder, python_file, method)).json()["id"]
        service.wait(job_id, lambda j: j["phase"] == "recover")
        postgres.cluster().stop()
        try:
            away = service.http.get(f"/jobs/{job_id}")
            assert (away.status_code, away.json()["code"]) == (503, "database_away"), away.text
            assert service.http.get("/readyz").status_code == 503
            assert service.http.get("/healthz").status_code == 200
            time.sleep(2)
        finally:
            postgres.cluster().start()
        done = service.wait(job_id, lambda j: j["status"] == "succeeded")
        assert done["attempt"] == 1
        events = service.events(job_id)
        assert [e["seq"] for e in events] == list(range(1, len(events) + 1))
        assert service.http.get("/readyz").status_code == 200


@needs_postgres
def test_what_postgres_cannot_hold_is_refused_with_a_sentence(tmp_path, python_file):
    """Its text has no NUL, which SQLite's has."""
    data: Path = tmp_path / "data"
    with running(data, workers=0, NARROW_DATABASE_URL=postgres.database_for(data)) as service:
        body = python_file.read_bytes()
        answers = [
            service.http.post("/datasets", files={"file": ("a\0b.jsonl", body)}),
            service.http.post("/datasets", files={"file": ("a.jsonl", b'{"text": "a\\u0000b ' + b"word " * 50 + b'"}\n')}),
            service.http.get("/jobs/job_%00"),
            service.http.get("/jobs", params={"after": "job_\0"}),
            service.http.post(
                "/jobs",
                json={"base": {"model": "mdl_\0"}, "target": {"dataset": "ds_\0"}, "budget": {"parameters": 0.5}},
                headers={"Idempotency-Key": "a"},
            ),
            service.http.delete("/models/mdl_%00"),
        ]
        for answer in answers:
            assert answer.status_code < 500, answer.text
