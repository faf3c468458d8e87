"""`narrow serve`: the API and its workers on this machine; `narrow keys` and `narrow tenants`: who may use it, and how much.

Help and completion load this module alone: what a command needs is loaded when it runs.
"""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from service.api.schemas import Role

JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON, and nothing else on stdout.")
DATA = click.option(
    "--data",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder of the service, as 'narrow serve' has it; by default NARROW_DATA, or ./narrow-data.",
)


@click.command(
    epilog="\b\nExamples:\n  narrow serve --data ./narrow-data\n  narrow serve --host 0.0.0.0 --workers 2\n\n"
    "Read on: docs/how-to/run-a-service.md, and docs/reference/settings.md for all settings (NARROW_*)."
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at; beyond loopback API keys are needed.")
@click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="0 takes a free one.")
@click.option("--data", type=click.Path(file_okay=False, path_type=Path), help="Folder for everything; by default NARROW_DATA.")
@click.option("--workers", default=1, show_default=True, type=click.IntRange(0), help="Worker processes; 0 for the API alone.")
@JSON
def serve(host: str, port: int, data: Path | None, workers: int, as_json: bool) -> None:
    """Start the service: the API and its workers.

    Prints one line with its URL when it is ready. SIGTERM or Ctrl-C drains: running jobs write a checkpoint and go on after the
    next start; a second one stops at once. What it has accepted survives any kill.
    """
    from service import server

    server.serve(host, port, data, workers, as_json)


@click.group(
    epilog="\b\nExamples:\n  narrow keys create laptop --role admin --data ./narrow-data\n  narrow keys list\n\n"
    "Read on: docs/how-to/run-a-service.md"
)
def keys() -> None:
    """Make, list and revoke API keys, on the service's machine.

    The first one, and those of other tenants. --data or NARROW_DATA says which service (NARROW_DATABASE_URL if its database is
    elsewhere), and stderr which it was.
    """


@keys.command(
    "create",
    epilog="\b\nExamples:\n  narrow keys create laptop --role admin\n  narrow keys create ci --tenant team-a --days 90",
)
@click.argument("name")
@click.option(
    "--role",
    type=click.Choice(["read", "write", "admin"]),
    default="write",
    show_default=True,
    help="To look; to make and end things too; to make and revoke keys too.",
)
@click.option(
    "--tenant", default="default", show_default=True, help="Whose models, data and jobs it sees; made by its first key."
)
@click.option("--days", type=click.FloatRange(0, 3650, min_open=True), help="Until it expires; by default never.")
@DATA
@JSON
def create_key(name: str, role: "Role", tenant: str, days: float | None, data: Path | None, as_json: bool) -> None:
    """Make an API key and print it, once."""
    from pydantic import ValidationError

    from narrow_engine.spec import wording
    from service import auth
    from service.api.keys import as_key
    from service.api.schemas import NewKey, SecretKey
    from service.server import open_database

    if not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,39}", tenant):
        raise click.UsageError(f"--tenant {tenant[:80]!r} should be small letters, digits and hyphens, 40 at most.")
    try:
        wanted = NewKey(name=name, role=role, expires_in_days=days)
    except ValidationError as error:
        first = error.errors()[0]
        raise click.UsageError(f"{first['loc'][0]} {wording(first)}.") from error
    with open_database(data, make=True) as session:
        row, secret = auth.create_key(session, wanted.name, wanted.role, tenant, auth.expiry(wanted))
        session.commit()
        made = SecretKey(**as_key(row).model_dump(), key=secret)
    if as_json:
        click.echo(made.model_dump_json(indent=2))
        return
    click.echo(f"{made.id} is made, of the tenant {tenant} with the role {role}. The key, shown only now:", err=True)
    click.echo(secret)


@keys.command("list")
@DATA
@JSON
def list_keys(data: Path | None, as_json: bool) -> None:
    """All keys of all tenants, without themselves."""
    from sqlmodel import col, select

    from service.api.keys import as_key
    from service.db.tables import KeyRow, now
    from service.server import open_database

    with open_database(data) as session:
        rows = [as_key(row) for row in session.exec(select(KeyRow).order_by(col(KeyRow.id)))]
    if as_json:
        click.echo(json.dumps([row.model_dump(mode="json") for row in rows], indent=2))
        return
    for row in rows:
        state = "revoked" if row.revoked_at else "expired" if row.expires_at and row.expires_at <= now() else "counts"
        used = f"used {row.used_at:%Y-%m-%d}" if row.used_at else "never used"
        click.echo(f"{row.id}  …{row.hint}  {row.tenant:<16} {row.role:<6} {state:<8} {used:<16} {row.name}")
    if not rows:
        click.echo("There are no keys: narrow keys create NAME makes one.", err=True)


@keys.command("revoke")
@click.argument("key_id")
@DATA
@JSON
def revoke_key(key_id: str, data: Path | None, as_json: bool) -> None:
    """End a key: within a second, which is how long servers remember one."""
    from service.api.keys import as_key
    from service.db.tables import KeyRow, now
    from service.server import open_database

    with open_database(data) as session:
        row = session.get(KeyRow, key_id)
        if row is None:
            raise click.ClickException(f"There is no key {key_id[:80]!r}: narrow keys list shows all.")
        row.revoked_at = row.revoked_at or now()
        session.commit()
        ended = as_key(row)
    if as_json:
        click.echo(ended.model_dump_json(indent=2))
    else:
        click.echo(f"{key_id} does not count any more.", err=True)


@click.group(
    epilog="\b\nExamples:\n  narrow tenants list --data ./narrow-data\n  narrow tenants limit team-a --jobs 10 --hours 100"
)
def tenants() -> None:
    """Show and limit what tenants use, on the service's machine.

    --data or NARROW_DATA says which service (NARROW_DATABASE_URL if its database is elsewhere), and stderr which it was.
    """


@tenants.command("list")
@DATA
@JSON
def list_tenants(data: Path | None, as_json: bool) -> None:
    """All tenants, with what they use."""
    from service import quotas
    from service.server import open_database, settings_here

    settings = settings_here(data)
    with open_database(data) as session:
        found = {name: quotas.usage(session, settings, name) for name in quotas.by_tenant(session)}
    if as_json:
        click.echo(json.dumps({name: row.model_dump(mode="json", exclude={"role"}) for name, row in found.items()}, indent=2))
        return
    for name, row in found.items():
        pairs = (
            (row.jobs, row.limits.jobs, "jobs"),
            (row.bytes, row.limits.bytes, "bytes"),
            (row.hours, row.limits.hours, "hours"),
        )
        told = "  ".join(
            f"{used:,.10g} of {'any' if most is None else format(most, ',.10g')} {unit}" for used, most, unit in pairs
        )
        click.echo(f"{name:<16}  {told}")


@tenants.command("limit")
@click.argument("tenant")
@click.option("--jobs", type=click.IntRange(0), help="That wait, run or are paused at a time.")
@click.option("--bytes", "size", type=click.IntRange(0), help="That are kept.")
@click.option("--hours", type=click.FloatRange(0), help="That jobs run in thirty days.")
@DATA
@JSON
def limit_tenant(tenant: str, jobs: int | None, size: int | None, hours: float | None, data: Path | None, as_json: bool) -> None:
    """Set a tenant's limits. What is not given is as the service's settings say."""
    from service import quotas
    from service.db.tables import TenantRow
    from service.server import open_database, settings_here

    with open_database(data) as session:
        session.merge(TenantRow(name=tenant, max_jobs=jobs, max_bytes=size, max_hours=hours))
        session.commit()
        if as_json:
            limits = quotas.usage(session, settings_here(data), tenant).limits
            click.echo(json.dumps({"tenant": tenant, "limits": limits.model_dump(mode="json")}, indent=2))
