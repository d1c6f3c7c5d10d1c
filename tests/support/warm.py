"""Python processes that have torch already.

A test that needs a process of its own often needs torch in it, and importing that takes longer than the test. Here one
process imports it, and every other one is forked off that: a process of its own with a start and an end of its own, which
knows nothing of pytest and has imported nothing of the project. Where a system cannot fork they are started as usual.

A test that measures memory looks at what a process takes after its first steps: a forked one begins with what its parent had.
"""

import atexit
import contextlib
import functools
import json
import os
import signal
import socket
import subprocess
import sys

RUNNING = 1000
"""No exit code."""

SERVER = r"""
RUNNING = 1000
import ctypes, gc, importlib, json, os, socket, sys, warnings
import numpy, psutil, safetensors.torch, torch

gc.freeze()  # a child that ends would look at all of torch for garbage, and copy it by that
if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim"):
    ctypes.CDLL(None).malloc_trim(0)  # what a child takes is seen: there is nothing freed that it could take unseen

server, own_path = socket.socket(fileno=int(sys.argv[1])), [path for path in sys.path if path]
order = None
while order is None:
    said, files, _, _ = socket.recv_fds(server, 1 << 16, 3)
    while said and not said.endswith(b"\n"):
        said += server.recv(1 << 16)
    if not said:
        os._exit(0)
    order = json.loads(said)
    if "wait" in order:
        pid, status = os.waitpid(order["wait"], 0 if order["block"] else os.WNOHANG)
        server.sendall(b"%d\n" % (os.waitstatus_to_exitcode(status) if pid else RUNNING))
    else:
        with warnings.catch_warnings():
            # Newer Pythons warn of forks where there are threads; those of a library sleep, and it knows of forks.
            warnings.simplefilter("ignore")
            child = os.fork()
        if child:
            server.sendall(b"%d\n" % child)
        for number, file in enumerate(files):
            if not child:
                os.dup2(file, number)
            os.close(file)
    if "wait" in order or child:
        order = None
server.close()
os.environ.clear()
os.environ.update(order["env"])
os.chdir(order["cwd"])
sys.argv = ["-c", *order["arguments"]]
sys.path[:] = [*filter(None, order["env"].get("PYTHONPATH", "").split(os.pathsep)), *own_path]
if "PYTHONSAFEPATH" not in order["env"]:
    sys.path.insert(0, "")
importlib.invalidate_caches()
if order["quiet"]:
    warnings.simplefilter("ignore")
sys.stdin, sys.stdout, sys.stderr = (open(n, mode, buffering=1, encoding="utf-8") for n, mode in enumerate("rww"))
code = order["code"]
del server, own_path, order, said, files, child
exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
"""


def start(code, *arguments, env=None, cwd=None, quiet=False):
    """`python -c code arguments` as a process with pipes for its three streams. `quiet`: without warnings."""
    arguments, env, cwd = [str(argument) for argument in arguments], dict(env or os.environ), str(cwd or os.getcwd())
    if hasattr(os, "fork"):
        return _Forked(code, arguments, env, cwd, quiet)
    command = [sys.executable, *(["-W", "ignore"] if quiet else []), "-c", code, *arguments]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen(command, env=env, cwd=cwd, text=True, encoding="utf-8", **pipes)


def run(code, *arguments, **more):
    """As `subprocess.run` does with its output captured."""
    with start(code, *arguments, **more) as child:
        out, err = child.communicate()
    return subprocess.CompletedProcess([code, *arguments], child.returncode, out, err)


class _Forked:
    """What `subprocess.Popen` is for a child of one's own, for a child of the server's."""

    def __init__(self, code, arguments, env, cwd, quiet):
        ends = [os.pipe() for _ in range(3)]
        theirs, ours = [ends[0][0], ends[1][1], ends[2][1]], [ends[0][1], ends[1][0], ends[2][0]]
        self.returncode = None
        self.stdin, self.stdout, self.stderr = (
            os.fdopen(end, mode, buffering=1, encoding="utf-8") for end, mode in zip(ours, "wrr", strict=True)
        )
        order = {"code": code, "arguments": arguments, "env": env, "cwd": cwd, "quiet": quiet}
        self.pid = _ask(order, theirs)
        for end in theirs:
            os.close(end)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for stream in (self.stdout, self.stderr, self.stdin):
            with contextlib.suppress(BrokenPipeError):
                stream.close()
        self.wait()

    def poll(self):
        return self._wait(block=False)

    def wait(self):
        return self._wait(block=True)

    def kill(self):
        if self.returncode is None:
            os.kill(self.pid, signal.SIGKILL)

    def communicate(self, said=""):
        with contextlib.suppress(BrokenPipeError):
            self.stdin.write(said)
            self.stdin.close()
        # What is said on the second stream is less than a pipe holds, so it can wait.
        out, err = self.stdout.read(), self.stderr.read()
        self.wait()
        return out, err

    def _wait(self, block):
        if self.returncode is None:
            code = _ask({"wait": self.pid, "block": block})
            self.returncode = None if code == RUNNING else code
        return self.returncode


def _ask(order, files=()):
    server, said = _server(), json.dumps(order).encode("utf-8") + b"\n"
    # The files go with the first bytes.
    server.sendall(said[socket.send_fds(server, [said], files) :])
    answer = b""
    while not answer.endswith(b"\n"):
        part = server.recv(64)
        assert part, "the process that others are forked off has ended"
        answer += part
    return int(answer)


@functools.cache
def _server():
    ours, theirs = socket.socketpair()
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-c", SERVER, str(theirs.fileno())]
    process = subprocess.Popen(command, env=env, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
    theirs.close()
    # It ends with the socket. Waited for, so that its time counts as ours.
    atexit.register(process.wait)
    atexit.register(ours.close)
    return ours
