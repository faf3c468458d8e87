"""Shuts a process in before it begins: `python -I -S sandbox.py LIMITS PROGRAM ARGUMENT...`

What runs on users' files may be taken over by them. So before such a program starts, this gives away what it will not need, as
far as the kernel lets anybody without rights do so:

    processes namespaces: it sees no others, has no shared memory or messages with them, and nothing that it starts outlives it
    files     mounts: everything is read-only but where it works, and what is hidden is not there; and
              Landlock: it reads what it is shown, and makes no links or pipes that others would follow
    network   no sockets, or where drivers of GPUs want some, none that can be connected; or, for processes that train together, a
              network namespace with nothing in it but themselves
    calls     seccomp: no debugging, mounting, kernel modules, io_uring, keys, BPF
    limits    memory, size of a file, number of files; no core dumps, no capabilities, first to go when memory runs out

LIMITS is JSON, which `before` makes: `read` and `write` (paths), `together` (a folder that holds what is written and is one
mount, since from mount to mount there are no hard links), `list` (folders whose names may be read), `hide` (folders of which
nothing is there but what is read and written in them), `memory` and `file` (bytes), `files`, `processes`, `network` (whether
processes talk to each other), `require` (end with status 1 if a layer is missing), `parent` (the process that it dies with).
`--probe` instead prints what this machine lacks, as JSON. It runs without the program's libraries, so it starts in milliseconds,
and imports nothing of Narrow's.

Where namespaces are allowed there are three processes: this one, which waits and ends as the program did; the first of the
namespace, with which the kernel ends all others there; and the program. Where they are not, this becomes the program.

https://docs.kernel.org/userspace-api/landlock.html, https://docs.kernel.org/userspace-api/seccomp_filter.html,
user_namespaces(7), pid_namespaces(7), mount_setattr(2)
"""

import ctypes
import fcntl
import json
import os
import platform
import resource
import select
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Callable
from typing import Any

libc = ctypes.CDLL(None, use_errno=True)

PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 22, 38
NEW_MOUNTS, NEW_IPC, NEW_USER, NEW_PROCESSES, NEW_NETWORK = 0x20000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
ANY_NEW = 0x7E020000
MOUNT_PRIVATE, MOUNT_SAFE = 0x4000 | 1 << 18, 2 | 4 | 8  # with all below it; no setuid, devices, programs
MOUNT_BIND = 0x1000
OPEN_TREE, MOVE_MOUNT, MOUNT_SETATTR = 428, 429, 442
HERE, RECURSIVE, CLONE, TO_A_PATH = -100, 0x8000, 1, 4
READ_ONLY = 1

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
HIDDEN = ("/tmp", "/var/tmp", "/run", "/dev/shm")  # noqa: S108
"""Where other programs have their sockets, locks and shared memory."""
DEVICES = ("null", "zero", "full", "random", "urandom")
NVIDIA = ("nvidia", "dxg")  # the latter in Windows' subsystem for Linux
GPUS = (*NVIDIA, "dri", "kfd")

REFUSED = {
    # What reaches into other processes or the kernel.
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "pidfd_getfd": (438, 438),
    "bpf": (321, 280),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "userfaultfd": (323, 282),
    "perf_event_open": (298, 241),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    # Other files and namespaces.
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "unshare": (272, 97),
    "setns": (308, 268),
    "open_by_handle_at": (304, 265),
    # What others of the same user do, and what slows them down.
    "inotify_add_watch": (254, 27),
    "fanotify_init": (300, 262),
    "setpriority": (141, 140),
    "ioprio_set": (251, 30),
    "sched_setparam": (142, 118),
    "sched_setscheduler": (144, 119),
    "sched_setattr": (314, 274),
    # Memory that belongs to no process, and so to nobody's limit.
    "shmget": (29, 194),
    "msgget": (68, 186),
    "semget": (64, 190),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
}
"""Calls, by their numbers on x86_64 and on aarch64."""
REFUSED_ALONE = {"connect": (42, 203), "setsid": (112, 157), "setpgid": (109, 154)}
"""And to a program that is one process: it talks to nobody, and all of it is one group."""
SOCKET = (41, 198)
OWN = {"prlimit64": (302, 261), "sched_setaffinity": (203, 122)}
"""Calls of which the first argument is whom they change: 0, who makes them."""
FAMILIES = (2, 10, 16)
"""Of sockets of processes that train together: IPv4, IPv6, and what says which addresses there are. One process has none."""
MACHINES = {"x86_64": (0, 0xC000003E, 56), "aarch64": (1, 0xC00000B7, 220)}
"""Which of the numbers, the kernel's name of the machine, and the number of `clone`."""


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


def _there(devices: tuple[str, ...]) -> bool:
    """Whether there are GPUs of a kind.

    The driver of NVIDIA's does not start where it may not name its threads, by files in /proc, listen at an address of its own,
    where others would ask it for memory, and make files in memory: torch then finds no GPU and takes the CPU."""
    return any(name.startswith(devices) for name in os.listdir("/dev"))  # noqa: PTH208


def missing(limits: dict[str, Any], apart: bool) -> list[str]:
    """Gives everything away that `limits` does not name; `apart`: in namespaces. Returns what could not be, as sentences."""
    lacking = []
    version = libc.syscall(CREATE_RULESET, None, 0, 1)
    if not apart:
        lacking.append(
            "jobs can see what the service runs, set rights and times of its files, and leave processes behind if a worker is "
            "killed: namespaces of users, processes and mounts are not allowed here"
        )
        if 1 <= version < 6:
            lacking.append("jobs can signal the service's processes: the kernel's Landlock is too old for that")
    if limits.get("network") and not (_succeeds(_network_of_its_own) == 0 and _network_of_its_own() == 0):
        lacking.append("jobs on several processes can reach the network: network namespaces are not allowed here")
    if not _files(limits, version, apart):
        lacking.append("jobs can read every file that the service can: the kernel has no Landlock")
    _drop_capabilities()
    if not _calls(alone=not limits.get("network")):
        lacking.append(f"jobs can make every system call: seccomp is not there (on {platform.machine()})")
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


def _namespaces() -> bool:
    """Whether what this process starts from now on has processes, mounts and messages of its own."""
    wanted = NEW_PROCESSES | NEW_MOUNTS | NEW_IPC
    return _as_a_new_user(wanted) or libc.unshare(wanted) == 0


def _as_a_new_user(wanted: int) -> bool:
    """Takes namespaces as nobody but root may, in one of users where this one may."""
    user, group = os.getuid(), os.getgid()
    if libc.unshare(NEW_USER | wanted) != 0:
        return False
    for name, line in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        with open(f"/proc/self/{name}", "w") as file:  # noqa: PTH123
            file.write(line)
    return True


def _network_of_its_own() -> int:
    """0 if the process is now in a network where there is nothing but itself and what it starts."""
    if libc.unshare(NEW_NETWORK) != 0 and not _as_a_new_user(NEW_NETWORK):
        return 1
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        up = struct.pack("16sh", b"lo", 1 | 64)  # IFF_UP, IFF_RUNNING
        fcntl.ioctl(any_socket, 0x8914, up)  # SIOCSIFFLAGS
    return 0


def _possible(limits: dict[str, Any]) -> bool:
    """Whether a process may have namespaces and mounts."""

    def attempt() -> int:
        return _succeeds(lambda: _mounts(limits)) if _namespaces() else 1

    return _succeeds(attempt) == 0


def _succeeds(attempt: Callable[[], int]) -> int:
    """What a function returns in a process that ends then, 1 if it raises: where systems allow namespaces by halves, as with
    AppArmor's rules for users, there is no way back."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = attempt()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _mounts(limits: dict[str, Any]) -> int:
    """Makes all that is mounted read-only but where the program writes, and hides what it is not shown. Raises OSError.

    Of two folders, one within the other, the inner says what is there. Returns 0."""
    write = [os.path.realpath(path) for path in ([limits["together"]] if limits.get("together") else limits.get("write", ()))]
    read = [os.path.realpath(path) for path in limits.get("read", ())]
    shared = ["/dev/shm"] if limits.get("network") else []  # noqa: S108 - what NCCL and gloo share memory in
    hidden = [os.path.realpath(path) for path in (*HIDDEN, *limits.get("hide", ())) if os.path.isdir(path)]  # noqa: PTH112
    working = os.getcwd()  # noqa: PTH109
    _done(libc.mount(None, b"/", None, MOUNT_PRIVATE, None), "/")
    _done(libc.mount(b"proc", b"/proc", b"proc", MOUNT_SAFE, None), "/proc")
    named = ["/proc"] if _there(NVIDIA) else []
    for path in _of_no_process() if named else ():
        _done(libc.mount(path.encode(), path.encode(), None, MOUNT_BIND, None), path)  # a mount of its own, which stays read-only
    shown = {path: _tree(path) for path in (*read, *write) if os.path.exists(path)}  # noqa: PTH110
    kinds = {path: os.path.isdir(path) for path in shown}  # noqa: PTH112
    for path in sorted({*hidden, *shown}, key=len):
        if path in shown:
            _make(path, kinds[path])
            _done(libc.syscall(MOVE_MOUNT, shown[path], b"", HERE, path.encode(), TO_A_PATH), path)
            os.close(shown[path])
        elif os.path.isdir(path):  # noqa: PTH112 - it may have been hidden with another
            size = b"mode=1777" if path in shared else b"mode=755,size=1m"
            _done(libc.mount(b"tmpfs", path.encode(), b"tmpfs", MOUNT_SAFE, size), path)
    _done(libc.syscall(MOUNT_SETATTR, HERE, b"/", RECURSIVE, struct.pack("4Q", READ_ONLY, 0, 0, 0), 32), "/")
    for path in (*write, *shared, *named):
        _done(libc.syscall(MOUNT_SETATTR, HERE, path.encode(), 0, struct.pack("4Q", 0, READ_ONLY, 0, 0), 32), path)
    if os.path.isdir(working):  # noqa: PTH112
        os.chdir(working)
    return 0


def _of_no_process() -> list[str]:
    """What in /proc is the system's and could be written to, as its settings."""
    with os.scandir("/proc") as found:
        return [
            entry.path
            for entry in found
            if not entry.name.isdigit() and not entry.is_symlink() and (entry.is_dir() or entry.stat().st_mode & 0o222)
        ]


def _tree(path: str) -> int:
    """What is mounted at a path and below it, to be put in another place."""
    found = libc.syscall(OPEN_TREE, HERE, path.encode(), CLONE | RECURSIVE | os.O_CLOEXEC)
    _done(found, path)
    return int(found)


def _make(path: str, folder: bool) -> None:
    if folder:
        os.makedirs(path, exist_ok=True)  # noqa: PTH103
    elif not os.path.exists(path):  # noqa: PTH110
        os.makedirs(os.path.dirname(path), exist_ok=True)  # noqa: PTH103, PTH120
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))


def _done(result: int, path: str) -> None:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), path)


def _files(limits: dict[str, Any], version: int, apart: bool) -> bool:
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
    # Not to root where the system's settings are there to be written to.
    if _there(NVIDIA) and (apart or os.geteuid() or os.statvfs("/proc/sys").f_flag & os.ST_RDONLY):
        allow("/proc", READ | WRITE_FILE)
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
    """The filter, for a program that is `alone`, or else several processes.

    It is a small program for each call's number: `(code, steps to skip if so, and if not, value)`."""
    if platform.machine() not in MACHINES:
        return False
    column, machine, clone = MACHINES[platform.machine()]
    load, equal, at_least, any_bit, answer = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, deny, unknown = 0x7FFF0000, 0x50000 | 13, 0x50000 | 38  # EACCES, ENOSYS
    number, kind, first = 0, 4, 16  # where they are in what the kernel hands it
    families: tuple[int, ...] = () if alone else FAMILIES
    refused = REFUSED | (REFUSED_ALONE if alone else {})
    if _there(GPUS):
        # Sockets within the machine, which one process alone can only listen at. NCCL uses both as well.
        families = (1, *families)
        refused = {name: numbers for name, numbers in refused.items() if name != "memfd_create"}
    program = [(load, 0, 0, kind), (equal, 1, 0, machine), (answer, 0, 0, deny)]
    program += [(load, 0, 0, number), (at_least, 0, 1, 0x40000000), (answer, 0, 0, deny)]  # x32: the same by other numbers
    for numbers in refused.values():
        program += [(equal, 0, 1, numbers[column]), (answer, 0, 0, deny)]
    # The flags of clone3 are in memory, where a filter cannot look; the C library then takes clone.
    program += [(equal, 0, 1, 435), (answer, 0, 0, unknown)]
    program += [(equal, 0, 4, clone), (load, 0, 0, first), (any_bit, 0, 1, ANY_NEW), (answer, 0, 0, deny), (answer, 0, 0, allow)]
    for numbers in OWN.values():
        program += [(equal, 0, 4, numbers[column]), (load, 0, 0, first), (equal, 0, 1, 0), (answer, 0, 0, allow)]
        program += [(answer, 0, 0, deny)]
    program += [(equal, 0, 2 * len(families) + 2, SOCKET[column]), (load, 0, 0, first)]
    for family in families:
        program += [(equal, 0, 1, family), (answer, 0, 0, allow)]
    program += [(answer, 0, 0, deny), (answer, 0, 0, allow)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in program))
    filter_ = struct.pack("HxxxxxxQ", len(program), ctypes.addressof(code))
    return bool(libc.prctl(PR_SET_SECCOMP, 2, filter_, 0, 0) == 0)


def _drop_capabilities() -> None:
    """With `no_new_privs` they do not come back, whoever the user is."""
    libc.capset(struct.pack("Ii", 0x20080522, 0), struct.pack("6I", *[0] * 6))


def _dies_with(parent: int) -> None:
    """From now on this process ends with the one that started it, which may be gone already."""
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _pass_on(child: int) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: os.kill(child, number))


def _first_process(limits: dict[str, Any], told: int, alive: int) -> None:
    """Of a namespace: mounts, starts the program in it, and writes to `told` how it ended. `alive` can be read from when who
    started this is gone."""
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if select.select([alive], [], [], 0)[0]:
        return
    _mounts(limits)
    program = os.fork()
    if program == 0:
        os.closerange(3, max(told, alive) + 1)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        _become(limits, apart=True)
    _pass_on(program)
    ended = 0
    while ended != program:  # what others leave behind becomes this one's as well
        ended, status = os.wait()
    os.write(told, struct.pack("i", status))


def _become(limits: dict[str, Any], apart: bool) -> None:
    lacking = missing(limits, apart)
    if lacking and limits.get("require"):
        sys.exit("NARROW_SANDBOX=require: " + "; ".join(lacking))
    if not apart:  # only now: with a change of rights the kernel forgets it
        _dies_with(limits.get("parent", os.getppid()))
    os.execv(sys.argv[2], sys.argv[2:])  # noqa: S606 - no shell is the point


def _wait(first: int, told: int) -> None:
    """Ends as the program did."""
    _pass_on(first)
    found = os.read(told, 4)
    os.waitpid(first, 0)
    status = struct.unpack("i", found)[0] if found else signal.SIGKILL
    if os.WIFSIGNALED(status):
        if os.WTERMSIG(status) != signal.SIGKILL:
            signal.signal(os.WTERMSIG(status), signal.SIG_DFL)
        os.kill(os.getpid(), os.WTERMSIG(status))
    os._exit(os.waitstatus_to_exitcode(status))


def main() -> None:
    if sys.platform != "linux":
        lacking = ["jobs are not shut in: this is not Linux"]
        if sys.argv[1] == "--probe":
            sys.stdout.write(json.dumps(lacking))
            return
        if json.loads(sys.argv[1]).get("require"):
            sys.exit("NARROW_SANDBOX=require: " + lacking[0])
        os.execv(sys.argv[2], sys.argv[2:])  # noqa: S606
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if sys.argv[1] == "--probe":
        sys.stdout.write(json.dumps(missing({"network": True}, _possible({"network": True}))))
        return
    limits = json.loads(sys.argv[1])
    _limit(limits)
    if not _possible(limits):
        _become(limits, apart=False)
    _namespaces()
    told, tell = os.pipe()
    alive, hold = os.pipe()
    _dies_with(limits.get("parent", os.getppid()))
    first = os.fork()
    if first == 0:
        status = 1
        try:
            os.close(told)
            os.close(hold)
            _first_process(limits, tell, alive)
            status = 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(status)
    os.close(tell)
    _wait(first, told)


if __name__ == "__main__":
    main()
