"""What users write, for type checkers: tests/unit/test_types.py has mypy and pyright read it, and nothing runs it."""

import asyncio
from pathlib import Path

import narrow_client
from narrow_client import models


def one_call() -> float:
    result = narrow_client.compress(
        base="./base",
        target=Path("python.jsonl"),
        budget=0.5,
        out="narrow-python",
        skills={"german": ("german.jsonl", "watch"), "quiz": ("quiz.jsonl", "keep", {"column": "answer"})},
        method={"recover": {"tokens": 160_000}},
        progress=lambda event: print(event.phase, event.message),  # noqa: T201
        cancel_on_interrupt=lambda job: job.status == "queued",
    )
    path: Path = result.model_path
    assert path.exists()
    return result.report.skills["python"].retention.value


def steps(spec: dict[str, object]) -> list[str]:
    with narrow_client.Narrow("http://127.0.0.1:8000", timeout=30, max_retries=2) as client:
        model: models.Model = client.models.upload("./base", name="base")
        dataset = client.datasets.upload(Path("python.jsonl"), column="text", bad_rows="skip")
        job = client.jobs.create({**spec, "base": {"model": model.id}, "target": {"dataset": dataset.id}})
        for event in client.jobs.events(job.id):
            seq: int = event.seq
            assert seq
        try:
            job = client.jobs.wait(job.id, timeout=3600)
        except narrow_client.JobTimeout as error:
            raise SystemExit(str(error)) from error
        except narrow_client.ApiError as error:
            codes: tuple[int, str, str] = (error.status, error.code, error.request_id)
            raise SystemExit(f"{codes}") from error
        first = next(client.jobs.list(limit=10).pages())
        cursor: str | None = first.next_cursor
        found = [item.id for item in client.jobs.list(status="succeeded", cursor=cursor)]
        paths = client.jobs.download(job.id, "out", "model/")
        return [*found, *(str(path) for path in paths)]


async def many(targets: list[str]) -> list[float]:
    async with narrow_client.AsyncNarrow() as client:
        results = await asyncio.gather(
            *(narrow_client.compress_async("mdl_1", target, out=f"out/{target}", client=client) for target in targets)
        )
        jobs: list[models.Job] = [job async for job in client.jobs.list()]
        assert jobs
        return [result.report.after.bytes / 1e6 for result in results]
