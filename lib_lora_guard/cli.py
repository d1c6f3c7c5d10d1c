"""The command line: `lora-guard` and `python -m lib_lora_guard`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from .errors import LoraGuardError
from .version import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; 0 on success, 1 on an error that is explained in one line, 130 when interrupted."""
    parser = argparse.ArgumentParser(prog="lora-guard", description="A memory-aware LoRA patcher.")
    parser.add_argument("--version", action="version", version=f"LoRA Guard {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the whole traceback of an error")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser(
        "demo", help="one LoRA on a Flux-shaped model in four formats, by the guard and merged; under a minute"
    )
    demo.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    options = parser.parse_args(arguments)
    try:
        from rich.console import Console

        from .demo.run import run_demo

        run_demo(Console(), options.markdown)
    except LoraGuardError as error:
        if options.debug:
            raise
        print(f"lora-guard: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0
