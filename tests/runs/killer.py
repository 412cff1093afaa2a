"""Runs that are killed, in processes of their own: `python -m tests.runs.killer` imports once and forks for every run.

It is another Python than the one that resumes, with another order of what it hashes, and without a GPU: where one is in
use by the process that forks, torch differentiates in none of its forks.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


class Killer:
    """The process that forks; it starts with the first run."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def run(self, function: str, *arguments: Any) -> tuple[int, str]:
        """The exit status of a process that calls a function, and what it printed.

        Args:
            function: `package.module:function` of the tests.
            arguments: what JSON can hold.
        """
        if self._process is None:
            environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
            command = [sys.executable, "-m", "tests.runs.killer"]
            self._process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps([function, *arguments]), file=self._process.stdin, flush=True)
        status, said = json.loads(self._process.stdout.readline())
        return status, said

    def kill(self, function: str, *arguments: Any) -> None:
        """Call a function that is to kill its process."""
        status, said = self.run(function, *arguments)
        assert status == -signal.SIGKILL, said

    def close(self) -> None:
        """End the process that forks."""
        if self._process is not None:
            self._process.communicate()


def serve() -> None:
    """Fork for every line of the input; answer with what came of it."""
    for line in sys.stdin:
        function, *arguments = json.loads(line)
        module, name = function.split(":")
        work = getattr(importlib.import_module(module), name)
        with tempfile.TemporaryFile("w+") as file:
            child = os.fork()
            if child == 0:
                _call(work, arguments, file.fileno())
            _, status = os.waitpid(child, 0)
            file.seek(0)
            print(json.dumps([os.waitstatus_to_exitcode(status), file.read()]), flush=True)


def _call(work: Any, arguments: list[Any], file: int) -> None:
    """Do the work with its output in a file; never returns."""
    for stream in (1, 2):
        os.dup2(file, stream)
    os.fsync = lambda file: None  # see tests/conftest.py
    code = 1
    try:
        work(*arguments)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve()
