"""The command line: `lora-guard` and `python -m lib_lora_guard`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from .errors import LoraGuardError
from .version import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; 0 on success, 1 on an error that is explained in one line, 130 when interrupted."""
    parser = argparse.ArgumentParser(
        prog="lora-guard",
        description="A memory-aware LoRA patcher. Inside Forge it works by itself; from Python see lib_lora_guard.LoraGuard.",
    )
    parser.add_argument("--version", action="version", version=f"LoRA Guard {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the whole traceback of an error")
    commands = parser.add_subparsers(dest="command")
    about = (
        "Makes a Flux-shaped model of 110 M parameters in bf16, fp8, NF4 and GGUF Q4_0 and a LoRA file for it, applies the "
        "LoRA by the guard and by merging, and prints what each costs and what is left of the LoRA. Under a minute on two "
        "free cores, 2 GB of RAM, no GPU."
    )
    demo = commands.add_parser("demo", help="one LoRA in four formats, by the guard and merged", description=about)
    demo.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        return 0
    try:
        from rich.console import Console

        from .demo.run import run_demo

        run_demo(Console(), options.markdown)
    except (LoraGuardError, OSError, MemoryError) as error:
        if options.debug:
            raise
        print(f"lora-guard: {str(error) or type(error).__name__}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("lora-guard: interrupted", file=sys.stderr)
        return 130
    return 0
