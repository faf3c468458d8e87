"""Shuts a process in before it begins: `python -I -S sandbox.py LIMITS PROGRAM ARGUMENT...`

What runs on users' files may be taken over by them. So before such a program starts, this gives away what it will not need, as
far as the kernel lets anybody without rights do so, and then becomes it:

    files     Landlock: it reads what it is shown, writes where it works, and makes no links or pipes that others would follow
    network   no sockets; or, for processes that train together, a network namespace with nothing in it but themselves
    calls     seccomp: no debugging, mounting, kernel modules, io_uring, keys, BPF
    limits    memory, size of a file, number of files; no core dumps, no capabilities, first to go when memory runs out

LIMITS is JSON, which `before` makes: `read` and `write` (paths), `list` (folders whose names may be read), `memory` and `file`
(bytes), `files`, `processes`, `network` (whether processes talk to each other), `require` (end with status 1 if a layer is
missing), `parent` (the process that it dies with). `--probe` instead prints what this machine lacks, as JSON. It runs without the
program's libraries, so it starts in milliseconds, and imports nothing of Narrow's.

https://docs.kernel.org/userspace-api/landlock.html, https://docs.kernel.org/userspace-api/seccomp_filter.html
"""

import ctypes
import fcntl
import json
import os
import platform
import resource
import signal
import socket
import struct
import subprocess
import sys
from typing import Any

libc = ctypes.CDLL(None, use_errno=True)

PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 22, 38
CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000

CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR, REMOVE_DIR, REMOVE_FILE = (1 << bit for bit in range(6))
MAKE_DIR, MAKE_REG, REFER, TRUNCATE, IOCTL_DEV = 1 << 7, 1 << 8, 1 << 13, 1 << 14, 1 << 15
READ = EXECUTE | READ_FILE | READ_DIR
WRITE = READ | WRITE_FILE | REMOVE_DIR | REMOVE_FILE | MAKE_DIR | MAKE_REG | REFER | TRUNCATE
OF_A_FILE = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE | IOCTL_DEV
BIND_TCP, CONNECT_TCP = 1, 2
ABSTRACT_SOCKETS, SIGNALS = 1, 2

SYSTEM = ("/usr", "/lib", "/lib32", "/lib64", "/bin", "/opt/rocm", "/opt/nvidia", "/sys", "/proc")
ETC = (
    "ld.so.cache",
    "ld.so.conf",
    "ld.so.conf.d",
    "localtime",
    "nsswitch.conf",
    "passwd",
    "group",
    "hosts",
    "host.conf",
    "fonts",
)
"""What libraries look up. The rest of /etc is nobody's business, and may hold keys."""
DEVICES = ("null", "zero", "full", "random", "urandom")
GPUS = ("nvidia", "dri", "kfd")

MACHINES = {
    # The kernel's number of the machine, of the calls that are refused to a process alone, and of prlimit64.
    "x86_64": (0xC000003E, {"socket": 41, "setsid": 112, "setpgid": 109}, 302),
    "aarch64": (0xC00000B7, {"socket": 198, "setsid": 157, "setpgid": 154}, 261),
}
REFUSED = {
    "x86_64": (
        101,
        310,
        311,
        321,
        248,
        249,
        250,
        323,
        298,
        165,
        166,
        155,
        272,
        308,
        175,
        313,
        176,
        246,
        320,
        304,
        141,
        251,
        142,
        144,
        314,
    ),
    "aarch64": (
        117,
        270,
        271,
        280,
        217,
        218,
        219,
        282,
        241,
        40,
        39,
        41,
        97,
        268,
        105,
        273,
        106,
        104,
        294,
        265,
        140,
        30,
        118,
        119,
        274,
    ),
}
"""ptrace, process_vm_readv, process_vm_writev, bpf, add_key, request_key, keyctl, userfaultfd, perf_event_open, mount, umount2,
pivot_root, unshare, setns, init_module, finit_module, delete_module, kexec_load, kexec_file_load, open_by_handle_at; and what
slows others of the same user down: setpriority, ioprio_set, sched_setparam, sched_setscheduler, sched_setattr."""
REFUSED_EVERYWHERE = (425, 426, 427, 428, 429, 430, 431, 432, 433, 438)
"""io_uring_setup, _enter, _register; open_tree, move_mount, fsopen, fsconfig, fsmount, fspick; pidfd_getfd."""


def libraries() -> list[str]:
    """Folders of Python and what it loads, which whoever is shut in can read in any case."""
    return [sys.prefix, sys.base_prefix, *filter(None, os.environ.get("LD_LIBRARY_PATH", "").split(":"))]


def before(**limits: Any) -> list[str]:
    """What a command is put behind to be shut in."""
    told = {"parent": os.getpid(), **limits, "read": [*libraries(), *map(str, limits.get("read", ()))]}
    # Without site-packages it starts in a tenth of the time.
    return [sys.executable, "-I", "-S", os.path.abspath(__file__), json.dumps(told)]  # noqa: PTH100


def lacking() -> list[str]:
    """What this machine cannot shut a process in with, as sentences."""
    command = [sys.executable, "-I", "-S", os.path.abspath(__file__), "--probe"]  # noqa: PTH100
    return list(json.loads(subprocess.run(command, capture_output=True, check=True).stdout))


def shut_in(limits: dict[str, Any]) -> list[str]:
    """Gives everything away that `limits` does not name. Returns what could not be, as sentences."""
    if sys.platform != "linux":
        return ["jobs are not shut in: this is not Linux"]
    lacking = []
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    _limit(limits)
    apart = _network_of_its_own() if limits.get("network") else False
    if not _files(limits):
        lacking.append("jobs can read every file that the service can: the kernel has no Landlock")
    if not _calls(alone=not limits.get("network")):
        lacking.append(f"jobs can make every system call: seccomp is not there (on {platform.machine()})")
    if limits.get("network") and not apart:
        lacking.append("jobs on several processes can reach the network: network namespaces are not allowed here")
    _drop_capabilities()
    return lacking


def _limit(limits: dict[str, Any]) -> None:
    kinds = {
        "memory": resource.RLIMIT_DATA,
        "file": resource.RLIMIT_FSIZE,
        "files": resource.RLIMIT_NOFILE,
        "processes": resource.RLIMIT_NPROC,
    }
    for name, kind in kinds.items():
        if limits.get(name):
            _, most = resource.getrlimit(kind)
            wanted = limits[name] if most == resource.RLIM_INFINITY else min(limits[name], most)
            resource.setrlimit(kind, (wanted, wanted))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        with open("/proc/self/oom_score_adj", "w") as file:  # noqa: PTH123 - pathlib costs more than all of this
            file.write("800")
    except OSError:
        pass


def _network_of_its_own() -> bool:
    """Whether the process is now in a network where there is nothing but itself and what it starts."""
    user, group = os.getuid(), os.getgid()
    if libc.unshare(CLONE_NEWNET) != 0:
        if libc.unshare(CLONE_NEWUSER | CLONE_NEWNET) != 0:
            return False
        for name, line in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
            with open(f"/proc/self/{name}", "w") as file:  # noqa: PTH123
                file.write(line)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        up = struct.pack("16sh", b"lo", 1 | 64)  # IFF_UP, IFF_RUNNING
        fcntl.ioctl(any_socket, 0x8914, up)  # SIOCSIFFLAGS
    return True


def _files(limits: dict[str, Any]) -> bool:
    version = libc.syscall(CREATE_RULESET, None, 0, 1)
    if version < 1:
        return False
    # What a kernel does not know yet it cannot forbid.
    known = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)) - 1
    network = 0 if limits.get("network") or version < 4 else BIND_TCP | CONNECT_TCP
    scopes = ABSTRACT_SOCKETS | SIGNALS if version >= 6 else 0
    handled = struct.pack("QQQ", known, network, scopes)[: 8 if version < 4 else 16 if version < 6 else 24]
    rules = libc.syscall(CREATE_RULESET, handled, len(handled), 0)
    if rules < 0:
        return False

    def allow(path: str, rights: int) -> None:
        try:
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            return
        if not os.path.isdir(path):  # noqa: PTH112
            rights &= OF_A_FILE
        libc.syscall(ADD_RULE, rules, 1, struct.pack("=Qi", rights & known, place), 0)
        os.close(place)

    for path in (*SYSTEM, *(f"/etc/{name}" for name in ETC), *limits.get("read", ())):
        allow(path, READ)
    for path in ("/dev", *limits.get("list", ())):
        allow(path, READ_DIR)
    for path in limits.get("write", ()):
        allow(path, WRITE)
    for name in os.listdir("/dev"):  # noqa: PTH208
        if name in DEVICES or name.startswith(GPUS):
            allow(f"/dev/{name}", READ_DIR | READ_FILE | WRITE_FILE | IOCTL_DEV)
    if limits.get("network"):  # what NCCL and gloo share memory in
        allow("/dev/shm", WRITE)  # noqa: S108
    done = libc.syscall(RESTRICT_SELF, rules, 0) == 0
    os.close(rules)
    return bool(done)


def _calls(alone: bool) -> bool:
    """The filter. A process that is `alone` needs no sockets, and leaves no group of processes: so it ends as a whole.

    It is a small program for each call's number, `(code, steps if so, steps if not, value)`."""
    machine = platform.machine()
    if machine not in MACHINES:
        return False
    number, names, prlimit = MACHINES[machine]
    refused = [*REFUSED[machine], *REFUSED_EVERYWHERE, *(names.values() if alone else ())]
    load, equal, at_least, answer = 0x20, 0x15, 0x35, 0x06
    allowed, denied = 0x7FFF0000, 0x00050000 | 13  # EACCES
    program = [
        (load, 0, 0, 4),
        (equal, 0, len(refused) + 6, number),
        (load, 0, 0, 0),
        (at_least, len(refused) + 4, 0, 0x40000000),  # the calls of x32, which are the same by other numbers
        *((equal, len(refused) - at + 3, 0, call) for at, call in enumerate(refused)),
        (equal, 0, 2, prlimit),  # which sets limits of any process of the user's: here only its own
        (load, 0, 0, 16),
        (equal, 0, 1, 0),
        (answer, 0, 0, allowed),
        (answer, 0, 0, denied),
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in program))
    filter_ = struct.pack("HxxxxxxQ", len(program), ctypes.addressof(code))
    return bool(libc.prctl(PR_SET_SECCOMP, 2, filter_, 0, 0) == 0)


def _drop_capabilities() -> None:
    """With `no_new_privs` they do not come back, whoever the user is."""
    libc.capset(struct.pack("Ii", 0x20080522, 0), struct.pack("6I", *[0] * 6))


def main() -> None:
    if sys.argv[1] == "--probe":
        sys.stdout.write(json.dumps(shut_in({"network": True})))
        return
    limits = json.loads(sys.argv[1])
    lacking = shut_in(limits)
    if lacking and limits.get("require"):
        sys.exit("NARROW_SANDBOX=require: " + "; ".join(lacking))
    if sys.platform == "linux":  # only now: with a change of rights the kernel forgets it
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != limits.get("parent", os.getppid()):
        os._exit(1)
    os.execv(sys.argv[2], sys.argv[2:])  # noqa: S606 - no shell is the point


if __name__ == "__main__":
    main()
