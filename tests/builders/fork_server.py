"""A process that has everything imported and forks a child for each command line: many runs, one start.

Protocol, one JSON object a line: {"argv", "log", "faults"} -> {"pid"}; {"wait": pid} -> {"code"}.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from builders.recipes import environment

SHIM = Path(__file__).with_name("io_faults.c")
KINDS = {"write": 1, "open": 2, "read": 4, "rename": 8, "sync": 16, "mkdir": 32}


class ForkServer:
    """The tests' end of it."""

    def __init__(self, folder: Path):
        """`folder`: for the compiled shim and the logs."""
        self.folder, self.number = folder, 0
        shim = folder / "io_faults.so"
        subprocess.run([shutil.which("gcc"), "-O1", "-shared", "-fPIC", "-o", shim, SHIM, "-ldl"], check=True)
        places = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
        self._process = subprocess.Popen(
            [sys.executable, __file__, shim],
            env=environment() | {"LD_PRELOAD": str(shim), "PYTHONPATH": places},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(self, argv: Sequence[str | Path], faults: dict[str, Any] | None = None) -> Child:
        """Fork a child that runs the command line; `faults`: folder, kinds, k, number, sticky."""
        self.number += 1
        log = self.folder / f"{self.number}.log"
        pid = self._ask({"argv": [str(a) for a in argv], "log": str(log), "faults": faults})["pid"]
        return Child(self, pid, log)

    def run(self, argv: Sequence[str | Path], faults: dict[str, Any] | None = None) -> Child:
        return self.start(argv, faults).wait()

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


class Child:
    """One command line; `code` is known after `wait`, `calls` (which could have failed) where there were faults."""

    def __init__(self, server: ForkServer, pid: int, log: Path):
        self.server, self.pid, self.log = server, pid, log

    def wait(self) -> Child:
        self.code = self.server._ask({"wait": self.pid})["code"]
        return self

    @property
    def running(self) -> bool:
        return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    @property
    def calls(self) -> int:
        return int(self.log.with_suffix(".calls").read_text())

    @property
    def said(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")


def _serve(shim: str) -> None:
    # Answers go where nothing else is printed.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    from rsaft_fast.process import prepare_process

    prepare_process()
    for name in ("train", "sample"):
        importlib.import_module(f"rsaft_fast.commands.{name}")
    for line in sys.stdin:
        question = json.loads(line)
        if "wait" in question:
            _, status = os.waitpid(question["wait"], 0)
            answer = {"code": os.waitstatus_to_exitcode(status)}
        elif (pid := os.fork()) == 0:
            os._exit(_child(question, shim))
        else:
            answer = {"pid": pid}
        print(json.dumps(answer), file=answers, flush=True)


def _child(question: dict[str, Any], shim: str) -> int:
    log = os.open(question["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    from rsaft_fast.cli import main

    library, faults = ctypes.CDLL(shim), question["faults"]
    if faults:
        kinds = sum(KINDS[kind] for kind in faults["kinds"])
        library.io_faults_arm(
            os.fsencode(faults["folder"]), kinds, ctypes.c_long(faults["k"]), faults["number"], faults["sticky"]
        )
    try:
        return main(question["argv"])
    except BaseException:
        import traceback

        traceback.print_exc()
        return 1
    finally:
        if faults:
            library.io_faults_seen.restype = ctypes.c_long
            Path(question["log"]).with_suffix(".calls").write_text(str(library.io_faults_seen()))
        sys.stdout.flush()
        sys.stderr.flush()


if __name__ == "__main__":
    _serve(sys.argv[1])
