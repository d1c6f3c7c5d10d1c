"""Guesses the program that the guard does not fit, from the names of its folders. For the sentence to its user alone:
whether the guard fits is decided by `forge_probe`, never here. Nothing is imported and nothing is changed."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from enum import Enum
from pathlib import Path

from ..errors import HostError
from ..messages import Message, reason
from ..reporting.report import clean_text


class Program(Enum):
    """Keys of the catalogue: `other_hosts.<value>` names the program, `other_hosts.<value>.do` says what to do in it."""

    A1111 = "a1111"
    OLD_FORGE = "old_forge"
    CLASSIC = "classic"
    REFORGE = "reforge"
    NEO = "neo"
    FORGE = "forge"
    COMFYUI = "comfyui"
    UNKNOWN = "unknown"


def recognise(folders: Sequence[str] | None = None) -> Program:
    """The program whose root is among `folders` (where Python imports from, if not given).

    The signs, seen in the programs' own trees: Forge has `backend` since August 2024; Forge before that, Forge Classic and
    reForge have ComfyUI's old code as `ldm_patched`; `modules_forge/forge_version.py` says "classic" and "neo" in words;
    AUTOMATIC1111's WebUI has neither.
    """
    roots = [Path(folder or ".") for folder in (sys.path if folders is None else folders)]
    for root in roots:
        version = _forge_version(root)
        if (root / "backend").is_dir():
            is_neo = version == "neo" or (root / "modules_forge" / "packages" / "comfy").is_dir()
            return Program.NEO if is_neo else Program.FORGE
        if (root / "ldm_patched").is_dir():
            if version == "classic":
                return Program.CLASSIC
            is_reforge = any((root / "extensions-builtin").glob("*[rR]e[fF]orge*"))
            return Program.REFORGE if is_reforge or not version.startswith("0.") else Program.OLD_FORGE
        if (root / "modules" / "sd_hijack.py").is_file():
            return Program.A1111
        if (root / "comfy").is_dir() and (root / "nodes.py").is_file():
            return Program.COMFYUI
    return Program.UNKNOWN


def explain(error: HostError, folders: Sequence[str] | None = None) -> Message:
    """One line for the user: the probe that failed, what this program seems to be, what to do."""
    why = reason(error)
    if isinstance(why, Message):
        # A sentence of the catalogue knows the cause; nothing is left to guess.
        return why
    program = recognise(folders)
    advice = f"other_hosts.{program.value}.do"
    if program in (Program.FORGE, Program.NEO) and _is_broken(error):
        advice = "other_hosts.broken.do"
    return Message(
        "other_hosts.why",
        {
            "probe": clean_text(" ".join(why.split())),
            "program": Message(f"other_hosts.{program.value}"),
            "advice": Message(advice),
        },
    )


def _forge_version(root: Path) -> str:
    try:
        text = (root / "modules_forge" / "forge_version.py").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    found = re.search(r"""^version\s*=\s*["']([^"']*)""", text, re.MULTILINE)
    return found.group(1) if found else ""


def _is_broken(error: HostError) -> bool:
    """True where a module of the program is there but fails when it is imported: an error of its own."""
    cause = error.__cause__
    absent = isinstance(cause, ModuleNotFoundError) and (cause.name or "").split(".")[0] == "backend"
    return cause is not None and not absent
