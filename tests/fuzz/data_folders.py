"""The guard's folder `data/`, damaged: rings, corrections and what else may lie there, and all that a host does with it."""

import contextlib
import io
import json
import logging
import os
import signal
import socket
import stat
from collections import Counter
from pathlib import Path

from lib_lora_guard import cli
from lib_lora_guard.commands.doctor import known_crash
from lib_lora_guard.memory.calibration import Calibration, Key, Kind
from lib_lora_guard.memory.calibration_file import VERSION
from lib_lora_guard.memory.calibration_report import kept_in
from lib_lora_guard.messages import message_of
from lib_lora_guard.private_files import other_than_file
from lib_lora_guard.recorder.crash_report import crash_report
from lib_lora_guard.recorder.flight_recorder import Phase
from lib_lora_guard.recorder.flight_ring import SLOT_BYTES, packed
from lib_lora_guard.recorder.processes import machine_name, own_start_ms
from lib_lora_guard.runtime.data_folder import look_over
from lib_lora_guard.runtime.journal import Journal

from . import checks, damage

MOST_SECONDS = 20
MORE_BYTES = 32_000_000
KEY = Key(Kind.LOAD, "fuzz", "bf16")
THINGS = (
    "folder",
    "full folder",
    "pipe",
    "socket",
    "dangling",
    "loop",
    "to itself",
    "zero",
    "full",
    "canary",
    "hard link",
    "elsewhere",
)
CALIBRATION = ("calibration.json", "calibration.json.lock", "calibration.json.tmp", "calibration.json.old")


class Scene:
    """A folder on the disk, and what must be as it was afterwards."""

    def __init__(self, root, rng):
        self.root, self.rng, self.facts = root, rng, Counter()
        self.folder, self.outside = root / "data", root / "outside"
        self.outside.mkdir()
        self.canary = self.outside / "canary"
        self.canary.write_bytes(b"of another program" * 100)
        self._make()
        self.things = self._look()

    def _make(self):
        kind = self.rng.choices(("folder", "linked", "none", *THINGS, "file"), (60, 4, 2, *[0.5] * len(THINGS), 1))[0]
        self.facts[f"data is: {kind}"] += 1
        if kind == "file":
            self.folder.write_bytes(b"x")
        elif kind in THINGS and kind not in ("folder", "full folder"):
            self._plant(self.folder, kind)
        elif kind != "none":
            (self.outside / "shared").mkdir()
            if kind == "linked":
                self.folder.symlink_to(self.outside / "shared")
            else:
                self.folder.mkdir(self.rng.choice((0o755, 0o777, 0o700)))
            self._fill()

    def _fill(self):
        for _ in range(self.rng.choice((0, 1, 2, 5))):
            self._put(self._ring_name(), self._ring())
        for name in CALIBRATION:
            if self.rng.random() < 0.5:
                self._put(name, self._calibration() if name != CALIBRATION[1] else b"")
        for _ in range(self.rng.choice((0, 0, 1, 3))):
            self._put(self._odd_name(), self.rng.choice((b"", b"x", self._ring())))

    def _ring_name(self):
        pid, start = self.rng.choice(
            ((999999999, 1), (os.getpid(), own_start_ms()), (1, 1), (0, 0), (999999998, 10**14))
        )
        return f"flight-{pid}-{start}.{self.rng.choice(('ring', 'ring', 'ring', 'told'))}"

    def _odd_name(self):
        return self.rng.choice(
            (
                "notes.txt", "flight-.ring", "flight-1.ring", "flight-1-1-1.ring", "flight--1-1.ring", "flight-99999999999-1.ring", "flight-7-" + "9" * 16 + ".ring", "flight-\u0661-\u0661.ring",
                "flight-1-1\n.ring", "flight-\x1b[2J-1.ring", "\u202eflight-1-1.ring", "x" * 255, "calibration.json.x", "calibration.json\n", "Calibration.json", " ", "flight-1-1.told.told",
                "flight-*.told", "[a-z].ring", "-rf",
            )
        )  # fmt: skip

    def _ring(self):
        """Records of a dead or living process, whole or not."""
        rng, body = self.rng, b""
        for n in range(rng.choice((0, 1, 3, 16))):
            record = {
                "time": rng.choice((1.7e9, 0, -1, 1e300, "x")), "machine": rng.choice((machine_name(), "another")), "version": "0.2.0", "plan": {"ram": 6 << 30}, "memory_time": 1.0,
                "memory": rng.choice(({"ram_available": 1 << 30}, {"\x1b[2J": -1}, [], None)), "open": rng.choice(([], [["merge", 1.0]], [["merge", 1], ["sampling_step", 2]], [["\n", None]], 5)),
                "model": rng.choice(("flux.safetensors", "\x1b]0;x\x07", "名" * 300, 7, None)), "loras": rng.choice((["a.safetensors"], ["\n"] * 50, None)), "lora_count": rng.choice((1, -1, 1e400)),
            }  # fmt: skip
            text = json.dumps(record)
            if rng.random() < 0.2:
                text = json.dumps(damage._value(rng, 4))
            body += packed(n, text.encode()[: SLOT_BYTES - 20]).ljust(SLOT_BYTES, b"\0")
        return body.ljust(rng.choice((0, 16, 3)) * SLOT_BYTES, b"\0")

    def _calibration(self):
        rng = self.rng
        entry = {
            "key": ["card", "2.3", "load", "Flux", "nf4", "0", "1", ""],
            "count": 3,
            "predicted": 1000,
            "errors": [70, -3],
        }
        entries = [
            {**entry, rng.choice(list(entry)): damage._value(rng, 2)} if rng.random() < 0.5 else entry
            for _ in range(rng.choice((0, 1, 3)))
        ]
        document = {"version": rng.choice((VERSION, VERSION, VERSION, 1, "2", None)), "entries": entries}
        return json.dumps(rng.choice((document, document, document, damage._value(rng, 5)))).encode()

    def _put(self, name, content):
        """A file under a name, whole or damaged, or something else in its place."""
        path, rng = self.folder / name, self.rng
        if os.path.lexists(path):
            return None
        how = rng.choice(("whole", "whole", "bytes", "bytes", "words", "sparse", "thing", "thing"))
        self.facts[f"file: {how}"] += 1
        if how == "thing":
            return self._plant(path, rng.choice(THINGS))
        if how == "bytes":
            content = damage.in_bytes(content, rng)
        elif how == "words":
            content = damage.in_words(damage.joined(content, b""), rng)[8:]
        path.write_bytes(content)
        if how == "sparse":
            with contextlib.suppress(OSError), path.open("r+b") as file:
                file.truncate(rng.choice((1 << 20, 1 << 32, 1 << 40)))
        if rng.random() < 0.05:
            path.chmod(0)
        return None

    def _plant(self, path, kind):
        self.facts[f"thing: {kind}"] += 1
        if kind in ("folder", "full folder"):
            path.mkdir()
            if kind == "full folder":
                (path / "x").write_bytes(b"x")
        elif kind == "pipe":
            os.mkfifo(path)
        elif kind == "socket":
            where = os.getcwd()
            os.chdir(path.parent)  # a socket's path may have about a hundred bytes
            try:
                with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as made:
                    made.bind(path.name)
            finally:
                os.chdir(where)
        elif kind == "hard link":
            os.link(self.canary, path)
        else:
            targets = {
                "dangling": "nothing",
                "loop": path.name,
                "zero": "/dev/zero",
                "full": "/dev/full",
                "canary": self.canary,
                "elsewhere": self.outside,
                "to itself": self.folder,
            }
            path.symlink_to(targets[kind])

    def _look(self):
        """What has to stay: things of other kinds under any name, and files of other names."""
        found = {}
        for place in (self.root, self.folder) if self._is_used() else (self.root,):
            with contextlib.suppress(OSError):
                for path in place.iterdir():
                    ours = path.name.startswith(("flight-", "calibration.json"))
                    if not ours or other_than_file(path) is not None:
                        found[path] = stat.S_IFMT(path.lstat().st_mode)
        return found

    def _is_used(self):
        return self.folder.is_dir()

    def changes(self):
        """What is no more as it was."""
        wrong = [
            f"gone: {path.name!r}"
            for path, kind in self.things.items()
            if not os.path.lexists(path) or stat.S_IFMT(path.lstat().st_mode) != kind
        ]
        if self.canary.read_bytes() != b"of another program" * 100:
            wrong.append("a file of another program was written")
        if self._is_used():
            mine = self.folder / f"flight-{os.getpid()}-{own_start_ms()}.ring"
            if os.path.lexists(mine) and mine not in self.things:
                wrong.append("the recorder's own file is left")
            if not self.folder.is_symlink() and self.folder.stat().st_mode & 0o077:
                wrong.append("others may enter the folder")
        return wrong


class Memory:
    """A look at the memory."""

    alive_ram_bytes = 1 << 30

    def readings(self):
        return []


class Lines(logging.Handler):
    def __init__(self):
        super().__init__()
        self.said = []

    def emit(self, record):
        message = message_of(record)
        self.said.append((getattr(message, "key", "?"), str(message)))


def check(scene, seen):
    """Two starts of a host, and the doctor between them."""
    logger, lines = logging.getLogger("lib_lora_guard"), Lines()
    level, spread = logger.level, logger.propagate
    logger.addHandler(lines)
    logger.setLevel("INFO")
    logger.propagate = False
    old = signal.signal(signal.SIGALRM, _ended)
    try:
        for what, act in (("start", _host), ("doctor", _doctor), ("second start", _host)):
            lines.said.clear()
            signal.alarm(MOST_SECONDS)
            before = checks.reset_peak()
            try:
                text = act(scene, seen)
            except Exception:
                seen.say("raw error", f"{what}: {checks._trace()}")
                continue
            finally:
                signal.alarm(0)
            if before and checks.peak_bytes() - before > MORE_BYTES:
                seen.say("memory", f"{what}: {(checks.peak_bytes() - before) / 1e6:.0f} MB more")
            keys = [key for key, _ in lines.said]
            seen.outcomes.update(f"{what}: {key}" for key in keys)
            if len(keys) > len(set(keys)):
                seen.say("said twice", f"{what}: {keys}")
            wrong = [line for line in (*text, *(line for _, line in lines.said)) if not checks.is_line(line)]
            if wrong:
                seen.say("not printable", f"{what}: {wrong[0][:400]!r}")
    finally:
        signal.signal(signal.SIGALRM, old)
        logger.removeHandler(lines)
        logger.setLevel(level)
        logger.propagate = spread
    for change in scene.changes():
        seen.say("wrong state", change)


def _ended(*_):
    raise TimeoutError("it waits for something")


def _host(scene, seen):
    """All that a host does with the folder; returns the lines that it prints beside the log."""
    look_over(scene.folder)
    journal = Journal(Memory)
    crash = journal.open(scene.folder)
    text = [] if crash is None else [line.text(language) for line in crash_report(crash) for language in ("en", "zh")]
    seen.outcomes["told of a death"] += crash is not None
    with journal.phase(Phase.MERGE):
        kept = Calibration(scene.folder / CALIBRATION[0], "fuzz", "0")
        for _ in range(2):
            kept.record(KEY, 1000, 1100)
        if kept.correction_bytes(KEY) != 100:
            seen.say("wrong value", f"the correction is {kept.correction_bytes(KEY)}")
    journal.close()
    return text


def _doctor(scene, seen):
    if scene.rng.random() > 0.05:
        crash = known_crash(scene.folder)
        lines = [kept.line for kept in kept_in(scene.folder / CALIBRATION[0])]
        return lines + ([] if crash is None else list(crash_report(crash)))
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(["doctor", "--data", str(scene.folder), *scene.rng.choice(([], ["--json"]))])
    seen.outcomes[f"doctor ended with {code}"] += 1
    if code not in (0, 1):
        seen.say("raw error", f"doctor: {code}: {err.getvalue()[-600:]}")
    return (out.getvalue() + err.getvalue()).split("\n")


def remove(root: Path):
    """Takes everything away again, folders without rights too."""
    for path, folders, names in os.walk(root, topdown=False):
        for name in (*names, *(name for name in folders if (Path(path) / name).is_symlink())):
            (Path(path) / name).unlink()
        for name in folders:
            if not (Path(path) / name).is_symlink() and (Path(path) / name).exists():
                (Path(path) / name).rmdir()
    root.rmdir()
