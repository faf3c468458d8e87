"""The whole line on embedded defaults: serve, upload, compress, download, show. Everything it makes lies in demo/out.

python demo/demo.py [--recover-tokens N]
"""

import argparse
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import narrow_client
from rich.console import Console

from service.server import die_with_parent

HERE = Path(__file__).resolve().parent
OUT = HERE / "out"
SKILLS = ("c", "german", "medical", "math")


def serve() -> tuple[subprocess.Popen[str], str]:
    """Starts the service on a free port; returns it and its URL."""
    log = (OUT / "service.log").open("w")
    server = subprocess.Popen(
        [sys.executable, "-m", "narrow_client.cli", "serve", "--port", "0", "--data", str(OUT / "service")],
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        # Ctrl-C comes to the demo alone, which ends the service in order; and a killed demo takes the service along.
        start_new_session=True,
        preexec_fn=die_with_parent(),
    )
    assert server.stdout is not None
    line = server.stdout.readline()
    if "http" not in line:
        raise SystemExit(f"The service did not start; {OUT / 'service.log'} says why.")
    return server, line.split()[-1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recover-tokens", type=int, default=163_840)
    options = parser.parse_args()
    # An end by `kill` goes the same way as Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir()
    console, started = Console(), time.monotonic()
    server, url = serve()
    try:
        console.print(f"The service runs at {url}\nCompressing the model in demo/base to Python source, at half its size.\n")
        with narrow_client.Narrow(url) as client:
            result = narrow_client.compress(
                base=HERE / "base",
                target=HERE / "data" / "python.jsonl.gz",
                budget=0.5,
                out=OUT / "narrow-python",
                skills={name: (HERE / "data" / f"{name}.jsonl.gz", "watch") for name in SKILLS},
                method={"recover": {"tokens": options.recover_tokens}},
                options={"skill_tokens": 16_384},
                client=client,
            )
    except KeyboardInterrupt:
        console.print("\ninterrupted; stopping the service")
        return 130
    except narrow_client.NarrowClientError as error:
        console.print(f"{error}", markup=False)
        return 1
    finally:
        server.terminate()
        server.wait()
    paths = {**result.paths, "report": result.report_path}
    console.print()
    console.print(narrow_client.report_view(result.report, paths))
    console.print(f"\n{time.monotonic() - started:.0f} s in all. Open {result.report_path} in a browser.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
