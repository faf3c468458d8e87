"""Everything that can be set, in one place: environment variables NARROW_..., each with a default that works."""

import re
import sys
from pathlib import Path
from typing import Literal

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict


class Settings(BaseSettings):
    """`NARROW_DATA`, `NARROW_DATABASE_URL`, ...: one variable a field."""

    model_config = SettingsConfigDict(env_prefix="NARROW_", extra="ignore")

    data: Path = Field(Path("narrow-data"), description="Folder of database, uploads, runs and artifacts.")
    database_url: str = Field("", description="postgresql://USER@HOST/NAME; by default SQLite in the data folder.")
    storage_url: str = Field(
        "",
        pattern=r"^(s3://[^/]+(/.*)?)?$",
        description="s3://BUCKET/PREFIX, with AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, ...; by default the data folder.",
    )
    storage_links: bool = Field(
        False, description="Downloads are redirected to the bucket by presigned URLs: where clients reach it too."
    )
    keys: Literal["auto", "always", "never"] = Field(
        "auto", description="Whether requests need an API key; `auto`: everywhere but on loopback."
    )
    max_model_bytes: int = Field(64 * 2**30, gt=0, description="Largest upload of a model, all files together.")
    max_dataset_bytes: int = Field(64 * 2**30, gt=0, description="Largest upload of a dataset.")
    max_body_bytes: int = Field(2**20, gt=0, description="Largest body of every other request.")
    sandbox: Literal["auto", "require"] = Field(
        "auto", description="Jobs are shut in as far as the system allows it, which is said at start; or not started at all."
    )
    max_job_memory: int | None = Field(
        None, gt=0, description="Bytes of main memory of a job's process; by default the machine's. A job can ask for less."
    )
    max_job_seconds: float = Field(604_800.0, gt=0, description="How long the process of a job may run, all attempts together.")
    max_job_bytes: int = Field(
        512 * 2**30, gt=0, description="What a job may keep on disk while it runs, its checkpoints and stages together."
    )
    min_free_bytes: int = Field(256 * 2**20, ge=0, description="Uploads and new jobs are refused below this free space.")
    hub: str = Field(
        "",
        pattern=r"^(https?://([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:\d{1,5})?(/[A-Za-z0-9._~%/-]*)?)?$",
        description="URL of a hub with Hugging Face's HTTP API, such as https://huggingface.co, that models may be fetched from; "
        "by default there is none. It may be a mirror at a private address.",
    )
    # Less than what the janitor takes for left behind.
    hub_seconds: float = Field(3600.0, gt=0, le=18_000, description="How long it may take to fetch a model from the hub.")
    silence_seconds: float = Field(
        60.0, gt=0, description="Who sends nothing more of a body, or no whole head of a request, for so long counts as gone."
    )
    max_connections: int = Field(
        4096, ge=1, description="Open at a time, and no more than half the open files that the system allows the server."
    )
    log: Literal["text", "json"] = Field("text", description="Lines of the log: for people, or for programs.")
    audit_days: float = Field(365.0, gt=0, description="How long the audit log is kept.")
    webhook_private: bool = Field(False, description="Webhooks may also go to private addresses, and over plain HTTP.")
    max_jobs: int | None = Field(None, ge=0, description="Jobs of a tenant that wait or run at a time.")
    max_bytes: int | None = Field(None, ge=0, description="What is kept for a tenant.")
    max_hours: float | None = Field(None, ge=0, description="Hours that a tenant's jobs may run in thirty days.")
    max_requests: int = Field(1200, ge=1, description="Requests a minute of one API key to one server.")
    lease_seconds: float = Field(20.0, gt=0, description="A job whose worker has not been heard of for so long is taken over.")
    poll_seconds: float = Field(0.5, gt=0, description="How often workers look for jobs, and event streams for events.")
    cancel_seconds: float = Field(1.5, ge=0, description="Time that a cancelled job process has to end by itself.")
    drain_seconds: float = Field(20.0, ge=0, description="Time that a job process has to write a checkpoint when a worker stops.")
    runner: Literal["local", "ray"] = Field("local", description="Where jobs run: on the service's machine, or on a Ray cluster.")
    ray_url: str = Field("http://127.0.0.1:8265", description="The cluster's Jobs API; its token is RAY_AUTH_TOKEN.")
    ray_waiting: int = Field(
        8, ge=1, description="Jobs that wait in Ray for a node; in what order the others come is still open."
    )
    ray_cpus: int = Field(2, ge=1, description="CPUs that a job gets on the cluster which asks for no number of its own.")
    max_attempts: int = Field(3, ge=1, description="Starts of a job whose process or worker dies, before it is failed.")
    janitor_seconds: float = Field(300.0, gt=0, description="How often a worker without a job looks for what was left behind.")
    upload_seconds: float = Field(259_200.0, gt=0, description="Uploads go of which nothing has been made for so long.")
    stage_seconds: float = Field(86_400.0, ge=0, description="Stages that jobs share go when none has used them for so long.")
    max_stage_bytes: int = Field(50 * 2**30, ge=0, description="Of stages that a tenant's jobs share; beyond, the oldest go.")

    @property
    def database(self) -> str:
        """As SQLAlchemy names it: with the driver that the extra `postgres` installs."""
        url = self.database_url or f"sqlite:///{self.data.resolve() / 'narrow.db'}"
        return re.sub(r"^postgres(ql)?://", "postgresql+psycopg://", url)

    @property
    def uploads(self) -> Path:
        """Where bodies are spooled: on the data disk, so that what is accepted is moved and not copied."""
        return self.data / "uploads"

    @property
    def tenants(self) -> Path:
        """A folder a tenant, where its jobs run (`runs/JOB`) and leave each other their first stages (`stages`): that a stage is
        there already would tell others who else has the same data. Both are in one, to be linked and not copied."""
        return self.data / "tenants"

    def prepare(self) -> None:
        """Makes the folders."""
        for folder in (*(self.data / name for name in ("models", "datasets", "artifacts")), self.uploads, self.tenants):
            folder.mkdir(parents=True, exist_ok=True)


def reference() -> str:
    """All settings as a table in Markdown: docs/reference/settings.md."""
    rows = []
    for name, field in Settings.model_fields.items():
        default = field.default if field.default not in ("", None) else ""
        rows.append(f"| `NARROW_{name.upper()}` | {f'`{str(default).lower()}`' if default != '' else ''} | {field.description} |")
    head = ["# Settings", "", "Environment variables of the service, each with a default that works.", ""]
    return "\n".join([*head, "| variable | default | |", "|---|---|---|", *rows]) + "\n"


if __name__ == "__main__":
    sys.stdout.write(reference())
