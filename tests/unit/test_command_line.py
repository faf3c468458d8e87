"""The command line as shells and scripts see it: help, exit statuses, JSON, logs, completion, Ctrl-C in a terminal."""

import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from importlib.metadata import entry_points

import click
import narrow_client
import pytest
from misbehaving import (
    BODY,
    DATASET,
    EVENTS,
    FILES,
    JOB,
    MODEL,
    PLAN,
    answer,
    artifacts,
    event,
    file,
    hang_up,
    problem,
    run_cli,
    sse,
)
from narrow_client import _doctor, _render, models
from narrow_client.cli import FULL, GROUPS, main
from rich.console import Console
from tiny import ROOT

COMMANDS = {name: line for group in GROUPS.values() for name, line in group.items()}
JOB_PATH = f"/jobs/{JOB['id']}"
SWEEP_ID = "swp_0000000000000001"


def command_of(name):
    return main.get_command(click.Context(main), name)


def test_the_help_of_all_names_every_command_in_a_group_with_its_own_first_line():
    text = run_cli("--help").stdout
    assert run_cli().stdout == text, "and so does the bare command"
    assert {*COMMANDS} == {*main.list_commands(click.Context(main))}
    for title in GROUPS:
        assert f"\n{title}:\n" in text
    for name, line in COMMANDS.items():
        assert re.search(rf"^  {name} ", text, re.MULTILINE), name
        assert command_of(name).help.split("\n")[0] == line, name


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_each_command_has_an_example_that_it_understands(name):
    command = command_of(name)
    text = run_cli(name, "--help").stdout
    assert "Examples:" in text
    assert all(parameter.help for parameter in command.params if isinstance(parameter, click.Option) and not parameter.hidden)
    options = set(re.findall(r"--[a-z-]+", (command.epilog or "").replace("\\\n", "")))
    known = {flag for parameter in command.params for flag in parameter.opts}
    known |= {flag for sub in getattr(command, "commands", {}).values() for parameter in sub.params for flag in parameter.opts}
    # One example can show another command too.
    known |= {flag for other in ("compress", "upload", "jobs") for item in command_of(other).params for flag in item.opts}
    assert options <= known


def test_help_and_completion_load_neither_torch_nor_the_service():
    code = f"""
import io, sys
from contextlib import redirect_stdout, suppress
from narrow_client.cli import main
for name in {[*COMMANDS]!r}:
    with redirect_stdout(io.StringIO()), suppress(SystemExit):
        main([name, "--help"])
heavy = {{"torch", "transformers", "fastapi", "sqlalchemy", "onnx", "alembic"}} & set(sys.modules)
sys.exit(f"{{heavy}} were loaded" if heavy else 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("words", [["--help"], ["serve", "--help"], ["keys", "create", "--help"]])
def test_help_that_needs_nothing_of_the_client_loads_nothing_of_it(words):
    code = f"import sys; from narrow_client.cli import main; main({words}, standalone_mode=False); "
    code += "sys.exit(bool({'httpx', 'pydantic', 'rich', 'narrow_client._commands'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, check=False).returncode == 0


@pytest.mark.parametrize(
    ("answered", "status"),
    [
        (problem(400, "x", "S."), 2),
        (problem(422, "x", "S."), 2),
        (problem(413, "x", "S."), 2),
        (problem(401, "key_needed", "S."), 1),
        (problem(403, "not_allowed", "S."), 1),
        (problem(404, "job_not_found", "S."), 1),
        (problem(409, "job_finished", "S."), 1),
        (problem(429, "x", "S.", retry_after="3600"), 3),
        (problem(507, "disk_full", "S."), 3),
        (hang_up, 3),
        (answer(b"<html>"), 1),
        (answer(JOB), 0),
    ],
)
def test_exit_statuses_follow_what_the_service_says(server, impatient, answered, status):
    server.script[JOB_PATH] = [answered]
    result = run_cli("show", JOB["id"])
    assert result.exit_code == status, result.output
    assert (result.stdout == "") == (status != 0)


def test_wrong_usage_says_what_to_do(server):
    for arguments, said in (
        (("compres",), "Did you mean 'compress'?"),
        (("show", "mdl_1"), "is not the id of a job, which looks like job_"),
        (("delete", "nonsense"), "is not an id"),
        (("upload", "nowhere"), "does not exist"),
        (("jobs", "--limit", "0"), "0 is not in the range"),
        (("download", JOB["id"], "--format", "onnx", "--only", "x"), "give one of them"),
        (("doctor", "--budget", "0.5"), "give its --base too"),
        (("doctor", "--base", "no-such-folder"), "does not exist"),
        (("sweep", "nowhere.json"), "There is no file at 'nowhere.json'"),
    ):
        result = run_cli(*arguments)
        assert (result.exit_code, said in " ".join(result.stderr.split())) == (2, True), result.output
    assert not server.asked


USAGE = {"jobs": 0, "bytes": 0, "hours": 0.0, "limits": {"jobs": None, "bytes": None, "hours": None}, "role": "write"}


def test_every_command_prints_json_and_nothing_else_on_stdout(uploads, local, tmp_path):
    sweep = {"id": SWEEP_ID, "spec": {**JOB["spec"], "budgets": [JOB["spec"]["budget"]]}, "counts": {"cancelled": 1}}
    sweep |= {"finished": True, "created_at": JOB["created_at"], "points": []}
    sweep["spec"].pop("budget")
    page = {"next_cursor": None}
    uploads.script |= {
        "/plans": [answer(PLAN)],
        "/fetches": [answer(MODEL)],
        EVENTS: [sse(1, 2, end=True)],
        FILES: [artifacts()],
        FILES + "/model/w.bin": [file],
        f"/sweeps/{SWEEP_ID}/cancel": [answer(sweep)],
        "/readyz": [answer({"status": "ok", "version": "0.1.0", "checks": {}})],
        "/usage": [answer(USAGE)],
        f"/models/{MODEL['id']}": [answer(b"", 204)],
    }
    uploads.script |= {f"{JOB_PATH}/{verb}": [answer(JOB)] for verb in ("cancel", "pause", "resume")}
    lists = {"/jobs": JOB, "/models": MODEL, "/datasets": DATASET}

    def listed(path):
        uploads.script[path] = [answer({"data": [lists[path]] * 3, **page})]

    runs = {
        ("compress", *local, "--dry-run"): lambda found: found["after"],
        ("compress", *local, "--detach"): lambda found: found["id"] == JOB["id"],
        ("upload", local[1]): lambda found: found["id"] == MODEL["id"],
        ("upload", local[3]): lambda found: found["id"] == DATASET["id"],
        ("fetch", "owner/name"): lambda found: found["id"] == MODEL["id"],
        ("show", JOB["id"]): lambda found: found["spec"],
        ("cancel", JOB["id"]): lambda found: found["id"] == JOB["id"],
        ("cancel", SWEEP_ID): lambda found: found["counts"],
        ("pause", JOB["id"]): lambda found: found["id"] == JOB["id"],
        ("resume", JOB["id"]): lambda found: found["id"] == JOB["id"],
        ("download", JOB["id"], "--out", tmp_path / "d"): lambda found: len(found["files"]) == 1,
        ("delete", MODEL["id"]): lambda found: found["deleted"] == [MODEL["id"]],
    }
    for arguments, right in runs.items():
        result = run_cli(*arguments, "--json")
        assert result.exit_code == 0, result.output
        assert right(json.loads(result.stdout)), arguments
        plain = run_cli(*arguments)
        assert plain.exit_code == 0, plain.output
        assert not plain.stdout.startswith("{")
    result = run_cli("watch", JOB["id"], "--json")
    assert [json.loads(line)["seq"] for line in result.stdout.splitlines()] == [1, 2]
    assert result.stderr == ""
    for path in lists:
        listed(path)
        result = run_cli(path[1:], "--json", "--limit", "2")
        assert [row["id"] for row in json.loads(result.stdout)] == [lists[path]["id"]] * 2
        assert lists[path]["id"] in run_cli(path[1:]).stdout


def test_doctor_says_what_the_service_is(server, monkeypatch):
    monkeypatch.setattr("narrow_client._doctor.entry_points", lambda group: [])

    def in_the_past(handler):
        handler.date_time_string = lambda: "Mon, 01 Jan 2024 00:00:00 GMT"
        answer({"status": "ok", "version": "9.9", "checks": {"disk": "ok"}})(handler)

    server.script |= {
        "/readyz": [in_the_past],
        "/usage": [answer(USAGE)],
        "/jobs": [answer({"data": [JOB], "next_cursor": None})],
    }
    result = run_cli("doctor", "--json")
    found = json.loads(result.stdout)
    service = found["service"]
    assert (result.exit_code, service["status"], service["role"], service["jobs"]["queued"]) == (0, "ok", "write", 1)
    assert service["clock_skew_seconds"] < -1e6
    assert [note.split(" of ")[0] for note in service["notes"]] == ["the service is", "the clocks"]
    assert "pip install narrow" in found["machine"]["note"]
    server.script["/readyz"] = [answer({"status": "unavailable", "version": "0.1.0", "checks": {"disk": "full"}}, 503)]
    result = run_cli("doctor")
    assert (result.exit_code, "disk full" in result.stdout) == (3, True)
    server.script["/readyz"] = [hang_up]
    assert run_cli("doctor").exit_code == 3
    result = run_cli("doctor", "--base", ROOT / "demo" / "base")
    assert (result.exit_code, "full installation" in result.stderr) == (2, True)


def test_doctor_tells_sizes_and_times_as_a_dry_run_does():
    shown = io.StringIO()
    facts = {"weights_bytes": 7_790_000, "memory_bytes": 2_500_000_000, "estimated_seconds": 680.0, "answer_seconds": 4}
    Console(file=shown, width=100).print(_doctor.view("job", facts))
    assert [line.strip().split("  ")[-1].strip() for line in shown.getvalue().splitlines()[1:5]] == [
        "7,790,000 bytes",
        "2.5 GB",
        "11.3 minutes",
        "4 s",
    ]


def test_a_log_has_a_line_a_phase_and_one_in_half_a_minute_and_nothing_to_draw_with(monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr(_render, "monotonic", lambda: clock[0])
    noon = datetime(2026, 1, 1, 12, tzinfo=UTC)
    with _render.ProgressDisplay() as display:
        for second in range(0, 100):
            clock[0] = float(second)
            found = event(second + 1) | {"time": (noon + timedelta(seconds=second)).isoformat()}
            found["phase"], found["data"] = "recover", {"done": second, "total": 100, "loss": 1.5}
            display(models.Event.model_validate(found))
        display(models.Event.model_validate({**found, "kind": "finished", "data": {"seconds": 99.0}}))
    lines = capsys.readouterr().err.splitlines()
    assert [line[9:] for line in lines] == [
        *(f"recover: {second} of 100 loss 1.500" for second in (31, 62, 93)),
        "recover: done in 99.0 s",
    ]
    assert all(line.isprintable() for line in lines)


def test_quiet_is_quiet(uploads, local, tmp_path):
    uploads.script |= {EVENTS: [sse(1, end=True)], JOB_PATH: [answer({**JOB, "status": "failed"})]}
    result = run_cli("compress", *local, "--quiet", "--out", tmp_path / "o")
    assert (result.exit_code, result.stdout, result.stderr) == (1, "", "narrow: The job failed.\n")
    assert "follows it from anywhere" in run_cli("compress", *local, "--out", tmp_path / "o").stderr
    assert "follows it from anywhere" in run_cli("compress", *local, "--json", "--out", tmp_path / "o").stderr
    assert run_cli("watch", JOB["id"], "--quiet").stderr == "narrow: the job is failed\n"


def test_large_files_are_told_and_small_ones_are_not(server, tmp_path, monkeypatch):
    server.script |= {FILES: [artifacts()], FILES + "/model/w.bin": [lambda handler: file(handler, 30_000), file]}
    seen = []
    with narrow_client.Narrow(on_transfer=lambda *told: seen.append(told)) as client:
        client.jobs.download(JOB["id"], tmp_path / "a")
    assert {(name, total) for name, _, total in seen} == {("model/w.bin", len(BODY))}
    counts = [done for _, done, _ in seen]
    assert counts == sorted(counts)
    assert counts[-1] == len(BODY)
    assert run_cli("download", JOB["id"], "--out", tmp_path / "b").stderr == ""
    monkeypatch.setattr(_render, "LARGE", 1000)
    assert run_cli("download", JOB["id"], "--out", tmp_path / "c").stderr == "model/w.bin: 0.00 GB\n"
    assert run_cli("download", JOB["id"], "--out", tmp_path / "d", "--quiet").stderr == ""
    console = Console(force_terminal=True, width=120, file=io.StringIO())
    with _render.TransferDisplay(True, console) as display:
        for done in (0, 1500, 3000):
            display("w", done, 3000)
    assert "3.0/3.0 kB" in console.file.getvalue()


def complete(words, shell="bash", **environment):
    """What click offers in a shell for these words, of which the last is being typed."""
    typed = " ".join(words)
    asked = {"_NARROW_COMPLETE": f"{shell}_complete", "COMP_WORDS": typed, "COMP_CWORD": str(len(words) - 1)}
    environment = {**os.environ, **asked, **environment}
    code = "from narrow_client.cli import main; main(prog_name='narrow')"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    return done.stdout.strip()


def test_completion_offers_commands_options_choices_paths_and_ids(server):
    server.script["/jobs"] = [answer({"data": [{**JOB, "status": "running"}], "next_cursor": None})]
    server.script["/models"] = [answer({"data": [MODEL], "next_cursor": None})]
    assert {"plain,compress", "plain,compare", "plain,completion"} == set(complete(["narrow", "comp"]).split())
    assert "plain,--recover-tokens" in complete(["narrow", "compress", "--rec"])
    assert complete(["narrow", "compress", "--method", "di"]) == "plain,distill"
    assert complete(["narrow", "watch", "job_"]) == f"plain,{JOB['id']}"
    assert complete(["narrow", "compress", "--base", "mdl"]).split() == ["dir,mdl", f"plain,{MODEL['id']}"]
    assert complete(["narrow", "compress", "--base", "./de"]).split() == ["dir,./de"]


def test_completion_is_silent_and_quick_where_there_is_no_service(server):
    gone = threading.Event()
    server.script["/jobs"] = [lambda handler: gone.wait(300)]  # longer than a test may take
    assert complete(["narrow", "watch", "job_"]) == ""
    assert len(server.asked) == 1
    assert complete(["narrow", "watch", "job_"], NARROW_URL="http://127.0.0.1:9") == ""
    assert complete(["narrow", "watch", "job_"], NARROW_URL="nonsense") == ""
    gone.set()


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_says_how_to_install_it(shell):
    text = run_cli("completion", shell).stdout
    first, second, *_ = text.splitlines()
    # zsh reads the first line of a file to see what it completes.
    assert (first if shell != "zsh" else second).startswith(f"# To install: narrow completion {shell} > ")
    assert shell != "zsh" or first == "#compdef narrow"
    assert "_NARROW_COMPLETE" in text


def test_bash_completes(tmp_path):
    """A real bash sources the script and completes the word that is typed."""
    code = "from narrow_client.cli import main; main(prog_name='narrow')"
    (tmp_path / "narrow").write_text(f'#!/bin/sh\nexec {sys.executable} -c "{code}" "$@"\n')
    (tmp_path / "narrow").chmod(0o755)
    script = "source <(narrow completion bash); COMP_WORDS=(narrow run); COMP_CWORD=1; _narrow_completion narrow run narrow; "
    script += 'echo "${COMPREPLY[@]}"; complete -p narrow'
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "--norc", "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == ["run run-model", "complete -o nosort -F _narrow_completion narrow"], done.stderr


class Terminal:
    """`narrow` in a terminal, which can be read and typed into."""

    def __init__(self, *arguments):
        self.text = ""
        self.master, slave = pty.openpty()
        command = [sys.executable, "-m", "narrow_client.cli", *map(str, arguments)]

        def own():
            os.setsid()
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            import fcntl
            import termios

            fcntl.ioctl(0, termios.TIOCSCTTY, 0)

        environment = {**os.environ, "TERM": "xterm", "COLUMNS": "200"}
        self.process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env=environment, preexec_fn=own)
        os.close(slave)

    def until(self, words, seconds=60, again=""):
        """Reads up to these words; types `again` every two seconds that they do not come."""
        deadline, typed = time.monotonic() + seconds, time.monotonic()
        while words not in self.text:
            if time.monotonic() > deadline:
                self.process.kill()
                raise AssertionError(self.text)
            if again and time.monotonic() > typed + 2:
                self.type(again)
                typed = time.monotonic()
            if select.select([self.master], [], [], 0.1)[0]:
                try:
                    self.text += os.read(self.master, 65536).decode()
                except OSError:
                    break
        assert words in self.text, self.text

    def type(self, text):
        os.write(self.master, text.encode())

    def end(self):
        status = self.process.wait(60)
        os.close(self.master)
        return status


CTRL_C = "\x03"


def stream_that_stays(handler):
    handler.send_response(200)
    handler.send_header("content-type", "text/event-stream")
    handler.end_headers()
    handler.wfile.write(f"id: 1\ndata: {json.dumps(event(1))}\n\n".encode())
    handler.wfile.flush()
    handler.rfile.read(1)


@pytest.mark.parametrize(("typed", "cancelled"), [("y\n", True), ("\n", False), (CTRL_C, False)])
def test_ctrl_c_in_a_terminal_asks_whether_the_job_goes_too(uploads, local, typed, cancelled, tmp_path):
    uploads.script |= {EVENTS: [stream_that_stays], JOB_PATH + "/cancel": [answer({**JOB, "status": "cancelling"})]}
    terminal = Terminal("compress", *local, "--out", tmp_path / "o")
    terminal.until("read model and data")
    terminal.type(CTRL_C)
    terminal.until("Cancel the job as well? [y/N]:")
    terminal.type(typed)
    said = f"the job {JOB['id']} was cancelled" if cancelled else f"the job {JOB['id']} goes on: 'narrow watch"
    # Python's input() does not see a signal that comes just before it reads: whoever gets no answer presses again.
    terminal.until(said, again=CTRL_C if typed == CTRL_C else "")
    assert terminal.end() == 130
    assert (("POST", JOB_PATH + "/cancel") in [(method, path) for method, path, _ in uploads.asked]) == cancelled


def test_delete_asks_in_a_terminal(server):
    server.script[JOB_PATH] = [answer(b"", 204)]
    terminal = Terminal("delete", JOB["id"])
    terminal.until("for good? [y/N]:")
    terminal.type("\n")
    assert terminal.end() == 1
    assert not server.asked
    assert run_cli("delete", JOB["id"]).exit_code == 0


def test_no_color_is_no_colour(server, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    console = Console(force_terminal=True)
    with console.capture() as captured:
        console.print(_render.plan_view(narrow_client.models.Plan.model_validate(PLAN)))
    assert not re.search(r"\x1b\[[0-9;]*3[0-7]", captured.get())


def test_the_commands_of_the_full_installation_are_named_here_and_there():
    assert {entry.name for entry in entry_points(group="narrow.commands")} == FULL


def test_roles_and_the_tenant_are_those_of_the_service():
    from service import auth
    from service.db.tables import DEFAULT_TENANT

    options = {parameter.name: parameter for parameter in command_of("keys").commands["create"].params}
    assert tuple(options["role"].type.choices) == auth.ROLES
    assert options["tenant"].default == DEFAULT_TENANT


def test_keys_and_tenants_are_of_a_service_that_was_named_or_is_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("NARROW_DATA", "NARROW_DATABASE_URL"):
        monkeypatch.delenv(name, raising=False)
    for command in (("keys", "create", "me"), ("keys", "list"), ("tenants", "list"), ("tenants", "limit", "a", "--jobs", "1")):
        result = run_cli(*command)
        assert (result.exit_code, "There is no service" in result.stderr) == (2, True), result.output
    assert run_cli("keys", "list", "--data", "other").exit_code == 2
    assert not list(tmp_path.iterdir())
    # The first key may come before the first start, of a service that is named.
    result = run_cli("keys", "create", "me", "--data", "narrow-data")
    assert (result.exit_code, result.stdout[:4], str(tmp_path / "narrow-data") in result.stderr) == (0, "nrw_", True)
    assert [key["name"] for key in json.loads(run_cli("keys", "list", "--json").stdout)] == ["me"]
    monkeypatch.setenv("NARROW_DATA", str(tmp_path / "third"))
    assert run_cli("tenants", "list").exit_code == 2
    assert run_cli("keys", "create", "you").exit_code == 0
