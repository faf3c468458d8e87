"""What takes a job's process over finds itself shut in: no files of others, no network, no way out, and an end."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from live import QUICK, SLOW, running, spec_of

from narrow_engine import sandbox
from service.runners import local

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
    "makes one with a child": lambda: clone(0x10000000 | 17),
    "makes one with a child, the new way": lambda: call(435, (ctypes.c_uint64 * 11)(0x10000000, 0, 0, 0, 17), 88),
    "gives it other rights": lambda: os.chmod(secret, 0o640),
    "gives it another time": lambda: os.utime(secret),
    "asks for its size": lambda: os.stat(secret),
    "looks what is in /tmp": lambda: os.listdir("/tmp"),
    "sees what others run": lambda: open(f"/proc/{parent}/cmdline").read(),
    "watches others' files": lambda: call(INOTIFY, libc.inotify_init(), b"/usr", 0xFFF),
    "keeps memory in the kernel": lambda: call(SHMGET, 0, 1 << 20, 0o1600),
    "keeps memory in a file": lambda: call(MEMFD, b"x", 0),
    "moves the worker to a core": lambda: os.sched_setaffinity(int(parent), {0}),
    "talks to the machine's host": lambda: socket.socket(40, socket.SOCK_STREAM),
    "uses an odd protocol": lambda: socket.socket(17, socket.SOCK_DGRAM),
    "begins a session": lambda: call(SETSID),
    "changes the system's settings": lambda: os.open("/proc/sys/kernel/core_pattern", os.O_WRONLY),
    "presses the system's keys": lambda: os.open("/proc/sysrq-trigger", os.O_WRONLY),
    "becomes somebody else": lambda: os.setuid(12345),
    "takes all memory": lambda: bytearray(4 << 30),
    "fills the disk": lambda: write_much(work + "/much"),
    "opens every file": lambda: [os.open("/dev/null", 0) for _ in range(10_000)],
}

def clone(flags):
    child = libc.syscall(CLONE, flags, 0, 0, 0, 0)
    if child == 0:
        os._exit(0)
    if child < 0:
        raise OSError(ctypes.get_errno(), "refused")

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
BARE = {"gives it other rights", "gives it another time", "asks for its size", "sees what others run"}
"""What cannot be helped without namespaces."""
NAMES = ("PTRACE", "UNSHARE", "SETSID", "INOTIFY", "SHMGET", "MEMFD", "CLONE")
NUMBERS = {"x86_64": (101, 272, 112, 254, 29, 319, 56), "aarch64": (117, 97, 157, 27, 194, 279, 220)}

WITHOUT = """
import ctypes, os, struct, sys
libc = ctypes.CDLL(None)
libc.prctl(38, 1, 0, 0, 0)
program = [(0x20, 0, 0, 0), (0x15, 0, 1, UNSHARE), (0x06, 0, 0, 0x50000 | 1), (0x06, 0, 0, 0x7FFF0000)]
code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in program))
assert libc.prctl(22, 2, struct.pack("HxxxxxxQ", len(program), ctypes.addressof(code)), 0, 0) == 0
os.execv(sys.argv[1], sys.argv[1:])
"""


def numbered(code: str) -> str:
    for name, number in zip(NAMES, NUMBERS[os.uname().machine], strict=True):
        code = code.replace(name, str(number))
    return code


def without_namespaces() -> list[str]:
    """Before a command: it may make none, as in most containers."""
    return [sys.executable, "-c", numbered(WITHOUT)]


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


def with_a_gpu(tmp_path) -> list[str]:
    """Before a command and its limits: it is shut in as where there is a GPU of NVIDIA's, for which /dev/null stands."""
    code = Path(sandbox.__file__).read_text()
    assert code.count('NVIDIA = ("nvidia", ') == 1
    (tmp_path / "with_a_gpu.py").write_text(code.replace('NVIDIA = ("nvidia", ', 'NVIDIA = ("null", '))
    return [*sandbox.before()[:3], str(tmp_path / "with_a_gpu.py")]


def attacked(tmp_path, port, before=(), shuts_in=(), **limits) -> set[str]:
    """Which attacks were successful. `shuts_in` takes the place of the sandbox."""
    (tmp_path / "work").mkdir()
    (tmp_path / "others").mkdir()
    secret = tmp_path / "others" / "secret"
    secret.write_text("narrow.db")
    folders = {"write": [str(tmp_path / "work")], "hide": [str(tmp_path)]}
    shut_in = sandbox.before(**folders, memory=1 << 30, file=1 << 20, files=256, **limits)
    shut_in[: len(shuts_in)] = shuts_in
    done = subprocess.run(
        [*before, *shut_in, sys.executable, "-c", numbered(ATTACKS), str(tmp_path / "work"), str(secret), str(os.getpid())],
        capture_output=True,
        text=True,
        env={"PORT": str(port)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "work" / "own").read_text() == "x"
    return {name for name, answer in json.loads(done.stdout).items() if answer == "done"}


def test_nothing_gets_out_of_a_job(tmp_path, listening):
    assert sandbox.lacking() == [], "this machine has every layer, or this test says nothing"
    assert attacked(tmp_path, listening) == set()


def test_without_namespaces_little_more_gets_out(tmp_path, listening):
    """And that is said."""
    assert attacked(tmp_path, listening, without_namespaces()) == BARE
    probe = [*without_namespaces(), *sandbox.before()[:4], "--probe"]
    told = json.loads(subprocess.run(probe, capture_output=True, text=True, check=True).stdout)
    assert [sentence.partition(",")[0] for sentence in told] == [
        "jobs can see what the service runs",
        "jobs on several processes can reach the network: network namespaces are not allowed here",
    ]


def test_processes_that_train_together_reach_each_other_and_nobody_else(tmp_path, listening):
    assert attacked(tmp_path, listening, network=True) <= {
        "writes to shared memory",
        "begins a session",
    }
    code = (
        "import socket; s = socket.create_server(('127.0.0.1', 0)); c = socket.create_connection(s.getsockname());"
        "c.send(b'x'); print(s.accept()[0].recv(1))"
    )
    command = [*sandbox.before(network=True), sys.executable, "-c", code]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "b'x'\n"


DRIVER = """
import ctypes, os, socket, threading, time
libc = ctypes.CDLL(None)

def start():
    thread = threading.Thread(target=time.sleep, args=(5,), daemon=True)
    thread.start()
    with open(os.open(f"/proc/self/task/{thread.native_id}/comm", os.O_WRONLY), "w") as file:
        file.write("cuda-EvtHandlr")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listening:
        listening.bind(f"\\0cuda-uvmfd-{os.getpid()}")
        listening.listen()
    assert libc.syscall(MEMFD, b"cuda", 0) > 0

start()
if os.fork() == 0:
    start()
    os._exit(0)
print(os.waitstatus_to_exitcode(os.wait()[1]))
"""


@pytest.mark.parametrize("before", [(), without_namespaces()], ids=["namespaces", "bare"])
def test_a_gpus_driver_can_start_and_nothing_more_gets_out(tmp_path, listening, before):
    """In a job, and in what it starts to time a model."""
    if before and os.geteuid() == 0:
        pytest.skip("the system's settings are there to be written to: no driver starts")
    gpu = with_a_gpu(tmp_path)
    command = [*before, *gpu, sandbox.before()[4], sys.executable, "-c", numbered(DRIVER)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "0\n"
    more = {"keeps memory in a file"} if before == () else {"keeps memory in a file", *BARE}
    assert attacked(tmp_path, listening, before, gpu) == more


def test_a_job_of_roots_writes_no_settings_of_the_system(tmp_path, listening):
    """Where namespaces are not allowed, and whoever made the container has not made them read-only."""
    assert attacked(tmp_path, listening, without_namespaces(), with_a_gpu(tmp_path)) == {"keeps memory in a file", *BARE}


ESCAPE = """
import ctypes, os, sys, time
if os.fork() == 0:
    ctypes.CDLL(None).prctl(1, 0, 0, 0, 0)
    if len(sys.argv) > 2:
        os.setsid()
    if os.fork() == 0:
        print("out", flush=True)
        time.sleep(600)
    os._exit(0)
os.wait()
ctypes.CDLL(None).prctl(1, 0, 0, 0, 0)
time.sleep(600)
"""
WORKER = """
import os, subprocess, sys
from narrow_engine import sandbox
from service.runners import local
local.adopt()
how, mark, *together = sys.argv[1:]
command = [*sandbox.before(network=bool(together)), sys.executable, "-c", ESCAPE, mark, *together]
process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
assert process.stdout.readline() == "out\\n"
if how == "killed":
    os.kill(os.getpid(), 9)
local.end(process, 0)
"""


@pytest.mark.parametrize("together", [[], ["together"]])
@pytest.mark.parametrize(
    ("before", "how"), [((), "ended"), (without_namespaces(), "ended"), ((), "killed")], ids=["ended", "bare", "killed"]
)
def test_nothing_outlives_a_job(tmp_path, before, how, together):
    """Not what its own parent has left alone, nor what is in a session of its own where it may begin one, nor if its worker is
    killed and it has said that it wants to live on."""
    code, mark = WORKER.replace("ESCAPE", repr(ESCAPE)), str(tmp_path)
    done = subprocess.run([*before, sys.executable, "-c", code, how, mark, *together], text=True, check=False, timeout=60)
    assert done.returncode == (-9 if how == "killed" else 0)
    deadline = time.monotonic() + 10  # for the kernel, after a kill
    while (left := [one for one in psutil.process_iter(["cmdline"]) if mark in (one.info["cmdline"] or [])]) and (
        time.monotonic() < deadline
    ):
        time.sleep(0.05)
    assert not left


def test_what_a_system_lacks_can_be_insisted_on():
    command = [*without_namespaces(), *sandbox.before(require=True), "/bin/true"]
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert refused.returncode == 1
    assert "NARROW_SANDBOX=require: jobs can see what the service runs" in refused.stderr


def test_what_all_processes_of_a_job_take_is_counted(tmp_path):
    code = (
        "import mmap, os, time\n"
        "for _ in range(3):\n"
        "    if os.fork() == 0: kept = b'x' * (50 << 20); shared = mmap.mmap(-1, 50 << 20); shared.write(kept); break\n"
        "print('taken', flush=True); time.sleep(60)"
    )
    command = [*sandbox.before(), sys.executable, "-c", code]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout
    for _ in range(4):
        process.stdout.readline()
    memory, processes = local.taken(process)
    local.end(process, 0)
    assert 300 << 20 < memory < 450 << 20
    assert processes >= 4


def test_what_a_job_keeps_is_counted(tmp_path):
    (tmp_path / "a").write_bytes(bytes(1 << 20))
    os.link(tmp_path / "a", tmp_path / "b")
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(1 << 40)
    assert local.kept(tmp_path) == (1 << 20, 2)
    assert local.kept(tmp_path / "none") == (0, 0)


def test_the_way_a_program_ends_is_told():
    for code, status in (("os._exit(130)", 130), ("os.kill(os.getpid(), 11)", -11), ("os.kill(os.getpid(), 9)", -9), ("pass", 0)):
        command = [*sandbox.before(), sys.executable, "-c", f"import os; {code}"]
        assert subprocess.run(command, check=False).returncode == status
    waits = "import signal, time; signal.signal(15, lambda *_: exit(7)); print('ready', flush=True); time.sleep(60)"
    process = subprocess.Popen([*sandbox.before(), sys.executable, "-c", waits], stdout=subprocess.PIPE)
    assert process.stdout
    process.stdout.readline()
    process.terminate()
    assert process.wait(60) == 7


def test_files_are_linked_within_what_is_mounted_together(tmp_path):
    for name in ("run", "shelf"):
        (tmp_path / name).mkdir()
    folders = {"write": [str(tmp_path / "run"), str(tmp_path / "shelf")], "together": str(tmp_path)}
    code = "import os, sys; a, b = sys.argv[1:]; open(a, 'w').close(); os.link(a, b)"
    names = [str(tmp_path / "run" / "a"), str(tmp_path / "shelf" / "a")]
    subprocess.run([*sandbox.before(**folders), sys.executable, "-c", code, *names], check=True)
    assert (tmp_path / "shelf" / "a").stat().st_nlink == 2


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
        assert Path(process.environ()["HOME"]).is_relative_to(tmp_path / "data" / "tenants" / "default" / "runs" / job_id)
        service.http.post(f"/jobs/{job_id}/cancel").raise_for_status()
        service.wait(job_id, lambda job: job["status"] == "cancelled")


@pytest.mark.parametrize(
    ("setting", "value", "options", "codes", "words"),
    [
        ("NARROW_MAX_JOB_SECONDS", "3", SLOW, ("too_long",), "The job has run for 3 s"),
        ("NARROW_MAX_JOB_BYTES", "50000", SLOW, ("too_much_disk",), "NARROW_MAX_JOB_BYTES"),
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
