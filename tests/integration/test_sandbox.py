"""What takes a job's process over finds itself shut in: no files of others, no network, no way out, and an end."""

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from live import QUICK, SLOW, running, spec_of

from narrow_engine import sandbox

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="what shuts jobs in is Linux's")

ATTACKS = """
import ctypes, json, os, resource, socket, sys
work, secret, parent = sys.argv[1:]
libc = ctypes.CDLL(None, use_errno=True)

def call(*arguments):
    if libc.syscall(*arguments) < 0:
        raise OSError(ctypes.get_errno(), "refused")

def connect(kind, address):
    with socket.socket(kind) as made:
        made.settimeout(1)
        made.connect(address)

def write(path):
    with open(path, "w") as file:
        file.write("x")

attacks = {
    "reads a secret": lambda: open(secret).read(),
    "reads the password file": lambda: open("/etc/shadow").read(),
    "lists the service's folder": lambda: os.listdir(os.path.dirname(secret)),
    "reads its parent's environment": lambda: open(f"/proc/{parent}/environ").read(),
    "writes elsewhere": lambda: write(secret + ".new"),
    "writes to shared memory": lambda: write("/dev/shm/narrow-test"),
    "makes a link to it": lambda: os.symlink(secret, work + "/link"),
    "makes another name of it": lambda: os.link(secret, work + "/name"),
    "makes a pipe": lambda: os.mkfifo(work + "/pipe"),
    "changes what it runs": lambda: write(sys.prefix + "/narrow-test"),
    "connects out": lambda: connect(socket.AF_INET, ("1.1.1.1", 53)),
    "connects to this machine": lambda: connect(socket.AF_INET, ("127.0.0.1", int(os.environ["PORT"]))),
    "connects by a file": lambda: connect(socket.AF_UNIX, work + "/socket"),
    "kills the worker": lambda: os.kill(int(parent), 0),
    "limits the worker": lambda: resource.prlimit(int(parent), resource.RLIMIT_NOFILE, (1000, 1000)),
    "slows the worker down": lambda: os.setpriority(os.PRIO_PROCESS, int(parent), 19),
    "debugs the worker": lambda: call(PTRACE, 16, int(parent), 0, 0),
    "makes an io_uring": lambda: call(425, 1, ctypes.create_string_buffer(256)),
    "makes a namespace": lambda: call(UNSHARE, 0x10000000),
    "begins a session": lambda: call(SETSID),
    "becomes somebody else": lambda: os.setuid(12345),
    "takes all memory": lambda: bytearray(4 << 30),
    "fills the disk": lambda: write_much(work + "/much"),
    "opens every file": lambda: [os.open("/dev/null", 0) for _ in range(10_000)],
}

def write_much(path):
    import signal
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with open(path, "wb") as file:
        for _ in range(100):
            file.write(bytes(1 << 20))

found = {}
write(work + "/own")
for name, attack in attacks.items():
    try:
        attack()
        found[name] = "done"
    except (OSError, MemoryError) as error:
        found[name] = type(error).__name__
print(json.dumps(found))
"""
NUMBERS = {"x86_64": ("101", "272", "112"), "aarch64": ("117", "97", "157")}


def start(service, model, data, method) -> str:
    answer = service.http.post("/jobs", json=spec_of(service, model, data, method))
    assert answer.status_code == 201, answer.text
    return answer.json()["id"]


@pytest.fixture
def listening():
    """A server on this machine, which a job has no business with."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def attacked(tmp_path, port, **limits) -> dict[str, str]:
    (tmp_path / "work").mkdir()
    (tmp_path / "others").mkdir()
    secret = tmp_path / "others" / "secret"
    secret.write_text("narrow.db")
    ptrace, unshare, setsid = NUMBERS[os.uname().machine]
    code = ATTACKS.replace("PTRACE", ptrace).replace("UNSHARE", unshare).replace("SETSID", setsid)
    shut_in = sandbox.before(write=[str(tmp_path / "work")], memory=1 << 30, file=1 << 20, files=256, **limits)
    done = subprocess.run(
        [*shut_in, sys.executable, "-c", code, str(tmp_path / "work"), str(secret), str(os.getpid())],
        capture_output=True,
        text=True,
        env={"PORT": str(port)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "work" / "own").read_text() == "x"
    return json.loads(done.stdout)


def test_nothing_gets_out_of_a_job(tmp_path, listening):
    assert sandbox.lacking() == [], "this machine has every layer, or this test says nothing"
    assert {name for name, answer in attacked(tmp_path, listening).items() if answer == "done"} == set()


def test_processes_that_train_together_reach_each_other_and_nobody_else(tmp_path, listening):
    assert {name for name, answer in attacked(tmp_path, listening, network=True).items() if answer == "done"} <= {
        "writes to shared memory",
        "begins a session",
    }
    code = (
        "import socket; s = socket.create_server(('127.0.0.1', 0)); c = socket.create_connection(s.getsockname());"
        "c.send(b'x'); print(s.accept()[0].recv(1))"
    )
    command = [*sandbox.before(network=True), sys.executable, "-c", code]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "b'x'\n"


ESCAPE = """
import os, sys, time
if os.fork() == 0:
    if len(sys.argv) > 1:
        os.setsid()
    if os.fork() == 0:
        print(os.getpid(), flush=True)
        time.sleep(600)
    os._exit(0)
os.wait()
time.sleep(600)
"""
END = """
import subprocess, sys
from narrow_engine import sandbox
from service.runners import local
local.adopt()
together = sys.argv[1:]
command = [*sandbox.before(network=bool(together)), sys.executable, "-c", ESCAPE, *together]
process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
print(process.stdout.readline().strip(), flush=True)
local.end(process, 0)
"""


@pytest.mark.parametrize("together", [[], ["together"]])
def test_nothing_outlives_a_job_that_is_ended(together):
    """Not even what its own parent has left alone, in a session of its own where it may begin one."""
    code = END.replace("ESCAPE", repr(ESCAPE))
    done = subprocess.run([sys.executable, "-c", code, *together], capture_output=True, text=True, check=True, timeout=60)
    left = [process for process in psutil.process_iter() if process.pid == int(done.stdout)]
    assert all(process.status() == psutil.STATUS_ZOMBIE for process in left)


def test_what_a_system_lacks_is_said_and_can_be_insisted_on(tmp_path):
    """Within another sandbox there are no network namespaces, as in most containers."""
    outer = sandbox.before(read=[sandbox.__file__], write=[str(tmp_path)])
    told = subprocess.run([*outer, *sandbox.before()[:4], "--probe"], capture_output=True, text=True, check=True).stdout
    assert json.loads(told) == ["jobs on several processes can reach the network: network namespaces are not allowed here"]
    command = [*outer, *sandbox.before(network=True, require=True), "/bin/true"]
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert refused.returncode == 1
    assert "NARROW_SANDBOX=require: jobs on several processes can reach the network" in refused.stderr


def test_the_service_shuts_its_jobs_in(tmp_path, tiny_folder, python_file):
    secrets = {"NARROW_TEST_SECRET": "nrw_secret", "AWS_SECRET_ACCESS_KEY": "secret"}  # pragma: allowlist secret
    with running(tmp_path / "data", NARROW_MAX_JOB_MEMORY=str(8 << 30), **secrets) as service:
        job_id = start(service, tiny_folder, python_file, SLOW)
        service.wait(job_id, lambda job: job["phase"] == "recover")
        (process,) = service.children("narrow_engine")
        status = dict(
            line.split(":\t", 1) for line in Path(f"/proc/{process.pid}/status").read_text().splitlines() if ":\t" in line
        )
        assert (status["NoNewPrivs"], status["Seccomp"], int(status["CapEff"], 16)) == ("1", "2", 0)
        assert psutil.Process(process.pid).rlimit(psutil.RLIMIT_DATA)[0] == 8 << 30
        assert not {name for name in process.environ() if name.startswith(("NARROW_", "AWS_"))}
        assert Path(process.environ()["HOME"]).is_relative_to(tmp_path / "data" / "runs" / job_id)
        service.http.post(f"/jobs/{job_id}/cancel").raise_for_status()
        service.wait(job_id, lambda job: job["status"] == "cancelled")


@pytest.mark.parametrize(
    ("setting", "value", "options", "codes", "words"),
    [
        ("NARROW_MAX_JOB_SECONDS", "3", SLOW, ("too_long",), "The job has run for 3 s"),
        # So little that it ends as it begins: a library that is refused memory later may call it what it likes.
        ("NARROW_MAX_JOB_MEMORY", str(160 << 20), QUICK, ("out_of_memory",), "memory"),
    ],
)
def test_a_job_that_takes_too_much_is_ended_and_says_so(
    tmp_path, tiny_folder, python_file, setting, value, options, codes, words
):
    with running(tmp_path / "data", **{setting: value}) as service:
        job = service.wait(start(service, tiny_folder, python_file, options), lambda job: job["error"])
        assert job["status"] == "failed"
        assert job["error"]["code"] in codes, job["error"]
        assert words in job["error"]["message"]
        assert service.children("narrow_engine") == []
