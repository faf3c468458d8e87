"""A real S3 server: OpenStack Swift with its s3api, which checks signatures, as four processes in a temporary folder."""

import atexit
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import httpx
import pytest
from ports import free_port

USER, SECRET = "test:tester", "testing"  # pragma: allowlist secret

_COMMON = "[DEFAULT]\nbind_ip = 127.0.0.1\nbind_port = {port}\nworkers = 0\nswift_dir = {folder}\nlog_name = {name}\n"
_STORE = """devices = {folder}/devices
mount_check = false
[pipeline:main]
pipeline = {name}-server
[app:{name}-server]
use = egg:swift#{kind}
"""
_PROXY = """[pipeline:main]
pipeline = catch_errors cache s3api tempauth copy slo dlo versioned_writes proxy-server
[app:proxy-server]
use = egg:swift#proxy
allow_account_management = true
account_autocreate = true
[filter:catch_errors]
use = egg:swift#catch_errors
[filter:cache]
use = egg:swift#memcache
[filter:s3api]
use = egg:swift#s3api
s3_acl = false
[filter:tempauth]
use = egg:swift#tempauth
user_test_tester = {secret} .admin
[filter:copy]
use = egg:swift#copy
[filter:slo]
use = egg:swift#slo
[filter:dlo]
use = egg:swift#dlo
[filter:versioned_writes]
use = egg:swift#versioned_writes
"""


def _usable() -> bool:
    """Swift keeps what it knows of a file in extended attributes, which not every file system of /tmp has."""
    if find_spec("swift") is None or not hasattr(os, "setxattr"):
        return False
    with tempfile.NamedTemporaryFile() as probe:
        try:
            os.setxattr(probe.name, "user.narrow", b"x")
        except OSError:
            return False
    return True


needed = pytest.mark.skipif(not _usable(), reason="there is no Swift here, or /tmp has no extended attributes")


class Server:
    """`url` is where it listens; a bucket is made with `bucket`."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="narrow-s3-"))
        self.programs = Path(sys.executable).parent
        (self.folder / "devices" / "d").mkdir(parents=True)
        (self.folder / "swift.conf").write_text(
            "[swift-hash]\nswift_hash_path_suffix = narrow\n[storage-policy:0]\nname = all\ndefault = yes\n"
        )
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.ports = {name: free_port() for name in ("account", "container", "object", "proxy")}
        for name in ("account", "container", "object"):
            self._ring(name)
            text = (_COMMON + _STORE).format(port=self.ports[name], folder=self.folder, name=name, kind=name)
            (self.folder / f"{name}.conf").write_text(text)
        (self.folder / "proxy.conf").write_text(
            (_COMMON + _PROXY).format(port=self.ports["proxy"], folder=self.folder, name="proxy", secret=SECRET)
        )
        self.url = f"http://127.0.0.1:{self.ports['proxy']}"
        atexit.register(self.remove)
        self.start()

    def _ring(self, name: str) -> None:
        place = f"r1z1-127.0.0.1:{self.ports[name]}/d"
        builder = str(self.folder / f"{name}.builder")
        for arguments in (("create", "1", "1", "1"), ("add", place, "1"), ("rebalance",)):
            self._run("swift-ring-builder", builder, *arguments)

    def _run(self, program: str, *arguments: str) -> None:
        # Its exit status 1 is a warning: that one disk is few.
        subprocess.run([self.programs / program, *arguments], cwd=self.folder, capture_output=True, check=False, timeout=60)

    def start(self) -> None:
        for name in self.ports:
            with (self.folder / f"{name}.log").open("ab") as log:
                self.processes[name] = subprocess.Popen(
                    [self.programs / f"swift-{name}-server", str(self.folder / f"{name}.conf")],
                    stdout=log,
                    stderr=log,
                    env={**os.environ, "SWIFT_DIR": str(self.folder)},
                    start_new_session=True,
                )
        deadline = time.monotonic() + 60
        while not all(_listens(port) for port in self.ports.values()):
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.05)

    def bucket(self, name: str) -> dict[str, str]:
        """Makes a bucket and returns the settings of a service that keeps its files there."""
        import obstore
        from obstore.store import S3Store

        keys = {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": USER,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_REGION": "us-east-1",
        }
        store = S3Store(
            name,
            endpoint=self.url,
            access_key_id=USER,
            secret_access_key=SECRET,
            region="us-east-1",
            client_options={"allow_http": True},
        )
        # Of the library's calls none makes a bucket, but it signs what does.
        httpx.put(obstore.sign(store, "PUT", "", timedelta(minutes=1))).raise_for_status()
        return {"NARROW_STORAGE_URL": f"s3://{name}/some/prefix", **keys}

    def stop(self) -> None:
        """kill -9 of all."""
        for process in self.processes.values():
            process.kill()
            process.wait()

    def log(self) -> str:
        return "\n".join(path.read_text(errors="replace")[-2000:] for path in self.folder.glob("*.log"))

    def remove(self) -> None:
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@cache
def server() -> Server:
    return Server()
