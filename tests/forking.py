"""Processes that begin with what takes long to import: one that has it all forks another for each piece of work.

A script calls `serve`. Whoever asks has a `Forks` of that script, and gets exit status and output of each new process.
"""

import atexit
import importlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path


def serve(work, imported):
    """Call `work` with each line of standard input, as JSON, in a process of its own, until the input ends.

    Args:
        work: returns the exit status.
        imported: names of modules, imported before the first fork.
    """
    for name in imported:
        importlib.import_module(name)
    for line in sys.stdin:
        said, warned, asked = json.loads(line)
        process = os.fork()
        if process == 0:
            for number, path in enumerate((os.devnull, said, warned)):
                file = os.open(path, os.O_WRONLY if number else os.O_RDONLY)
                os.dup2(file, number)
                os.close(file)
            status = 1
            try:
                status = int(work(*asked))
            except SystemExit as end:
                status = end.code if isinstance(end.code, int) else int(end.code is not None)
                sys.stderr.write(f"{end.code}\n" if isinstance(end.code, str) else "")
            except BaseException:  # noqa: BLE001  (the loop above must not go on in the fork)
                sys.excepthook(*sys.exc_info())
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        _answer(process)
        _answer(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]))


def _answer(number):
    sys.stdout.write(f"{number}\n")
    sys.stdout.flush()


class Forks:
    """Processes of a script that serves, as many as ever work at a time; they end with this one."""

    def __init__(self, script, environment):
        self.command = [sys.executable, str(script)]
        self.environment = environment
        self.idle = queue.LifoQueue()
        atexit.register(self.end)

    def end(self):
        """End the processes that wait for work."""
        while not self.idle.empty():
            server = self.idle.get()
            server.stdin.close()
            server.wait()
            server.stdout.close()

    def ask(self, *asked, timeout=None):
        """Return exit status, output and error output of the work.

        Raises:
            TimeoutError: it took longer than `timeout` seconds.
        """
        try:
            server = self.idle.get_nowait()
        except queue.Empty:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            server = subprocess.Popen(self.command, env=self.environment, **pipes)
        with tempfile.NamedTemporaryFile() as said, tempfile.NamedTemporaryFile() as warned:
            server.stdin.write(json.dumps([said.name, warned.name, asked]) + "\n")
            server.stdin.flush()
            process = int(server.stdout.readline())
            over = threading.Event()

            def stop():
                over.set()
                os.kill(process, signal.SIGKILL)

            clock = threading.Timer(threading.TIMEOUT_MAX if timeout is None else timeout, stop)
            clock.daemon = True
            clock.start()
            status = int(server.stdout.readline())
            clock.cancel()
            self.idle.put(server)
            if over.is_set():
                raise TimeoutError(f"no end after {timeout} s")
            return status, said.read().decode(errors="replace"), warned.read().decode(errors="replace")


def scripts(package):
    """Return a `Forks` of `script_run` that imports the given package, has no GPU and one thread."""
    folder = Path(package.__file__).resolve().parent.parent
    given = {"PYTHONPATH": str(folder), "MPLBACKEND": "Agg", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    environment = os.environ | given
    environment.pop("TRITON_INTERPRET", None)
    return Forks(Path(__file__).with_name("script_run.py"), environment)
