"""Runs the command again and again from one process that has imported everything, and kills it at a file operation.

    python -m tests.killing FOLDER

reads lines of JSON, [n, arguments], and answers each with a line [exit code, operations]: the command with these
arguments, ended by SIGKILL before its n-th operation on a file below FOLDER (0: not ended).
"""

import json
import os
import signal
import sys
from pathlib import Path

EVENTS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.link", "os.symlink")


def count_operations(folder, report, n):
    """Count what changes files below the folder, and kill the process before the n-th of these operations."""
    done = 0

    def one(name):
        nonlocal done
        done += 1
        report(done, name)
        if done == n:
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event, arguments):
        if event not in EVENTS:
            return
        path = arguments[0]
        if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        if isinstance(path, bytes | str) and os.fsdecode(path).startswith("/") and folder not in os.fsdecode(path):
            return
        one(f"{event} {path}")

    sync = os.fsync

    def fsync(file):
        one(f"fsync {file}")
        sync(file)

    os.fsync = fsync
    sys.addaudithook(hook)


def run(folder, n, arguments):
    """In a process of its own: the exit code, and how many operations there were."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)

        def report(done, name):
            os.write(writing, f"{name}\n".encode())

        from rst_jax.main import main

        count_operations(str(folder), report, n)
        main(["main", *arguments])
    os.close(writing)
    with os.fdopen(reading) as operations:
        names = operations.read().splitlines()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), names


def serve(folder):
    """Answer until the lines end."""
    import jax
    import jax.experimental.multihost_utils

    import rst_jax.cli.draw
    import rst_jax.cli.evaluate
    import rst_jax.evaluation.card
    import rst_jax.experiments.sweep  # noqa: F401

    assert not jax._src.xla_bridge.backends_are_initialized()
    for line in sys.stdin:
        n, arguments = json.loads(line)
        print(json.dumps(run(folder, n, arguments)), flush=True)


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
