"""A command that keeps the machine quiet while something is timed: on a machine with company, it stops the others."""

import contextlib
import subprocess


@contextlib.contextmanager
def hushed(command):
    """Run the command meanwhile: it says by a line that all is quiet, and ends when its input does."""
    if not command:
        yield
        return
    with subprocess.Popen(command, shell=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        said = process.stdout.readline()
        try:
            yield
        finally:
            if not said or process.poll() is not None:
                print(f"--hush: {command!r} ended before the timing did", flush=True)
            process.stdin.close()
