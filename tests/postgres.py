"""A real Postgres: a cluster of its own for each test process, in a temporary folder, with a database for each data folder."""

import atexit
import os
import shutil
import subprocess
import tempfile
from contextlib import suppress
from functools import cache
from hashlib import sha256
from pathlib import Path

from ports import free_port

_PLACES = (*sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True), Path(shutil.which("initdb") or "/nowhere").parent)
BINARIES = next((folder for folder in _PLACES if (folder / "initdb").exists()), None)


class Cluster:
    """`initdb` and `postgres` as processes; as root they run as the user postgres or nobody, since they refuse root."""

    def __init__(self) -> None:
        assert BINARIES is not None
        self.folder = Path(tempfile.mkdtemp(prefix="narrow-pg-"))
        self.owner = next((name for name in ("postgres", "nobody") if _exists(name)), None) if os.geteuid() == 0 else None
        if self.owner:
            shutil.chown(self.folder, self.owner)
        self.port = free_port()
        self._run("initdb", "-D", str(self.folder / "data"), "-A", "trust", "-U", "narrow", "-E", "UTF8")
        self.start()
        atexit.register(self.remove)

    def start(self) -> None:
        # Without fsync a killed process loses nothing; a machine without power would.
        options = f"-p {self.port} -k {self.folder} -c listen_addresses=127.0.0.1 -c fsync=off -c max_connections=200"
        self._run("pg_ctl", "-D", str(self.folder / "data"), "-l", str(self.folder / "log"), "-o", options, "-w", "start")

    def stop(self) -> None:
        """As kill -9 of all its processes would: no checkpoint, and a recovery at the next start."""
        self._run("pg_ctl", "-D", str(self.folder / "data"), "-m", "immediate", "-w", "stop")

    def kill(self) -> None:
        """kill -9 of all its processes."""
        import psutil

        server = psutil.Process(int((self.folder / "data" / "postmaster.pid").read_text().splitlines()[0]))
        family = [server, *server.children(recursive=True)]
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(family, 30)

    def remove(self) -> None:
        with suppress(subprocess.CalledProcessError):
            self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def database(self, name: str) -> str:
        """The URL of a database, made if it is not there."""
        import psycopg

        with psycopg.connect(f"postgresql://narrow@127.0.0.1:{self.port}/postgres", autocommit=True) as connection:
            if not connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", [name]).fetchone():
                connection.execute(f'CREATE DATABASE "{name}"')
        return f"postgresql://narrow@127.0.0.1:{self.port}/{name}"

    def _run(self, program: str, *arguments: str) -> None:
        command = [BINARIES / program, *arguments]
        # Output into a file: the server inherits it and would keep a pipe open.
        with (self.folder / "out").open("a") as out:
            subprocess.run(command, user=self.owner, cwd=self.folder, stdout=out, stderr=out, check=True, timeout=120)


def _exists(user: str) -> bool:
    import pwd

    try:
        pwd.getpwnam(user)
    except KeyError:
        return False
    return True


@cache
def cluster() -> Cluster:
    return Cluster()


def database_for(data: Path) -> str:
    """The URL of the database that belongs to a data folder."""
    return cluster().database("d" + sha256(str(data.resolve()).encode()).hexdigest()[:16])
