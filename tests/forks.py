"""Processes that begin with everything imported: forks of one that imported it, a third of a second instead of ten.

Each is a process of its own, with its own XLA, environment, output and exit code. What starts them the usual way, and
so shows that a process finds everything by itself: tests/test_cli.py, tests/test_quickstart.py, tests/launch.
"""

import contextlib
import gc
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from pathlib import Path


def same_bits() -> dict[str, str]:
    """The environment of processes whose results are compared bit by bit: without the fusions' own code generator (the
    flags in conftest.py) the weights that a 2x2 mesh ends with were not the same twice.
    """
    return {"XLA_FLAGS": os.environ["XLA_FLAGS"].replace("--xla_cpu_use_fusion_emitters=false", "")}


LONGEST = 600  # seconds; what hangs ends with SIGALRM


class Forks:
    """run(*arguments): as `python -m eagle3_xla`; run_code(code, *arguments): as `python -c`; start: not waited for."""

    def __init__(self):
        self.server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, *arguments, environment: dict | None = None) -> subprocess.CompletedProcess:
        return self._run(None, arguments, environment)

    def run_code(self, code: str, *arguments, environment: dict | None = None) -> subprocess.CompletedProcess:
        return self._run(code, arguments, environment)

    def start(self, code: str, *arguments) -> int:
        """Its process's id. It ends as a zombie, until the next process begins; its stderr is the server's."""
        return self._ask(code, arguments, None, [os.devnull], wait=False)

    def _run(self, code, arguments, environment) -> subprocess.CompletedProcess:
        with tempfile.TemporaryDirectory() as folder:
            files = [str(Path(folder, name)) for name in ("stdout", "stderr")]
            exit_code = self._ask(code, arguments, environment, files, wait=True)
            output = [Path(file).read_text() for file in files]
        return subprocess.CompletedProcess(arguments, exit_code, *output)

    def _ask(self, code, arguments, environment, files, wait) -> int:
        request = {
            "code": code,
            "arguments": [str(argument) for argument in arguments],
            "environment": os.environ | (environment or {}),
            "folder": os.getcwd(),
            "files": files,
            "wait": wait,
        }
        print(json.dumps(request), file=self.server.stdin, flush=True)
        return int(self.server.stdout.readline())

    def close(self) -> None:
        self.server.stdin.close()
        self.server.wait()


def serve() -> dict | None:
    """Forks for each line on stdin, and says how that ended, or its process's id; returns the request in the fork."""
    for line in sys.stdin:
        request = json.loads(line)
        with contextlib.suppress(ChildProcessError):  # when there is none
            while os.waitpid(-1, os.WNOHANG)[0]:  # those that were not waited for
                pass
        child = os.fork()
        if not child:
            return request
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) if request["wait"] else child, flush=True)
    return None


def begin(request: dict) -> None:
    signal.alarm(LONGEST)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    places = [os.devnull, *request["files"]]
    for number, place in enumerate(places):
        os.dup2(os.open(place, os.O_RDWR | os.O_CREAT), number)
    sys.argv = ["-c", *request["arguments"]]
    if request["code"] is None:
        runpy.run_module("eagle3_xla", run_name="__main__", alter_sys=True)
    else:
        exec(compile(request["code"], "<string>", "exec"), {"__name__": "__main__"})


if __name__ == "__main__":
    gc.disable()
    import datasets  # noqa: F401
    import jax  # noqa: F401

    import eagle3_xla.data.prepare
    import eagle3_xla.plan.verdict
    import eagle3_xla.train.loop
    import eagle3_xla.xla.spmd  # noqa: F401

    gc.freeze()  # no fork looks for garbage among what was imported
    gc.enable()
    asked = serve()
    if asked is not None:
        begin(asked)
