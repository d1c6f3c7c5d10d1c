"""The command line: `lora-guard` and `python -m lib_lora_guard`."""

from __future__ import annotations

import argparse
import errno
import io
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from .commands import arguments
from .commands.page import in_users_language, users_language
from .errors import LoraGuardError, Message, reason
from .planning.rates import DEFAULT_GPU
from .version import __version__

# Each command imports its own modules when it runs, so that help and commands on headers never load torch.

_BAKE_DTYPES = ("keep", "bf16", "fp16", "fp32", "fp8_e4m3fn", "fp8_e5m2")
"""The keys of `baking.DTYPES`."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: The words after the program's name; None takes those of this process.

    Returns:
        The exit code: 0 on success, 1 after an error that was printed in one line, 130 if interrupted.

    Raises:
        SystemExit: With 2 for wrong usage, with 0 after help and the version, as argparse does.
    """
    parser = _parser()
    options = parser.parse_args(arguments.joined(sys.argv[1:] if argv is None else argv))
    if options.command is None:
        parser.print_help()
        return 0
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Names may hold letters that the console's encoding lacks: they are printed as '?'.
        sys.stdout.reconfigure(errors="replace")
    run: Callable[[Any], None] = options.run
    try:
        run(options)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader, such as `head`, has seen enough. Without this the interpreter complains when it flushes at its end.
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  # open until the end
        return 1
    except (LoraGuardError, OSError, MemoryError) as error:
        if options.debug:
            raise
        print(f"lora-guard: {_one_line(_said(error)) or type(error).__name__}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("lora-guard: interrupted", file=sys.stderr)
        return 130
    return 0


def _program() -> str:
    """Returns how the program was called: a WebUI's Python knows it as a module alone."""
    package = Path(__file__).parent.name
    return f"python -m {package}" if Path(sys.argv[0]).parts[-2:] == (package, "__main__.py") else "lora-guard"


def _said(error: Exception) -> str:
    """Returns the error as a sentence with the next step, also where the system refuses a file that is written."""
    return in_users_language(_sentence(error))


def _sentence(error: Exception) -> str:
    if not isinstance(error, OSError):
        return reason(error)
    file = str(error.filename) if error.filename else "the output"
    if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)):
        return Message("command.disk_full", {"file": file})
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return Message("command.not_permitted", {"file": file, "error": error.strerror or str(error)})
    return str(error)


def _one_line(text: str) -> str:
    """Replaces control characters: names from files must not steer the terminal."""
    return "".join(c if c.isprintable() else "?" for c in text)


class _Parser(argparse.ArgumentParser):
    """Says wrong usage in one line."""

    def error(self, message: str) -> NoReturn:
        said = Message("command.usage", {"program": self.prog, "what": _usage(_one_line(message))})
        self.exit(2, in_users_language(said) + "\n")


def _usage(message: str) -> str:
    """Returns argparse's sentence as one of the catalogue, where it is a usual one."""
    if found := re.fullmatch(r"argument (.+?): (.*)", message):
        return Message("command.argument", {"name": found[1], "what": found[2]})
    start, _, names = message.partition(": ")
    key = {"the following arguments are required": "command.required", "unrecognized arguments": "command.unrecognized"}
    return Message(key[start], {"names": names}) if start in key else message


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog=_program(),
        description="A memory-aware LoRA patcher. Inside Forge it works by itself; from Python see lib_lora_guard.LoraGuard.",
    )
    parser.add_argument("--version", action="version", version=f"LoRA Guard {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the whole traceback of an error")
    commands = parser.add_subparsers(dest="command")
    _add_plan(commands)
    _add_inspect(commands)
    _add_explain(commands)
    _add_bake(commands)
    _add_simulate(commands)
    _add_demo(commands)
    _add_doctor(commands)
    return parser


def _add_plan(commands: Any) -> None:
    about = (
        "Says what a stack of LoRAs on a model will cost, by the guard and by Forge's own two ways, and what to do. Reads the "
        "headers of the files only, so it answers at once. All costs are predictions."
    )
    plan = commands.add_parser(
        "plan", help="what LoRAs on a model will cost, before anything is loaded", description=about
    )
    plan.add_argument(
        "model", metavar="MODEL", type=arguments.model, help="checkpoint or transformer, safetensors or GGUF"
    )
    plan.add_argument(
        "loras",
        metavar="LORA[:STRENGTH]",
        nargs="*",
        type=arguments.typed(arguments.lora),
        help="LoRA file, and its strength after a colon (default 1)",
    )
    plan.add_argument(
        "--with",
        dest="beside",
        metavar="FILE",
        nargs="+",
        action="extend",
        type=arguments.part,
        default=[],
        help="text encoders and VAE that lie in files of their own; without it the usual ones are counted",
    )
    size = arguments.typed(arguments.size)
    plan.add_argument(
        "--vram",
        type=size,
        metavar="11GB",
        help="VRAM that Forge finds free: some 11GB of a 12 GB card (default: read from this machine)",
    )
    plan.add_argument(
        "--ram",
        type=size,
        metavar="16GB",
        help="RAM of the computer; 2 GB are left to the system (default: read from this machine)",
    )
    plan.add_argument(
        "--resolution", type=arguments.typed(arguments.resolution), default=(1024, 1024), metavar="1024x1024"
    )
    plan.add_argument("--batch", type=arguments.typed(arguments.batch), default=1, metavar="1", help="pictures at once")
    plan.add_argument(
        "--gpu",
        type=arguments.typed(arguments.gpu),
        metavar="NAME",
        help=f"card whose rates are assumed, or the known one nearest to it (default: this machine's; with --vram {DEFAULT_GPU})",
    )
    plan.add_argument(
        "--mode", choices=["auto", "bypass", "on_the_fly", "merge"], default="auto", help="the guard's mode"
    )
    plan.set_defaults(usage_error=plan.error)
    _add_common(plan, _plan)


def _add_inspect(commands: Any) -> None:
    about = "Says what a LoRA file is: kinds, ranks, what it was made for, what its trainer wrote; with --model, what of it fits."
    inspect = commands.add_parser("inspect", help="what a LoRA file is, and whether it fits a model", description=about)
    inspect.add_argument("lora", metavar="LORA", type=arguments.any_file)
    inspect.add_argument(
        "--model", metavar="MODEL", type=arguments.model, help="checkpoint or transformer to hold it against"
    )
    _add_common(inspect, _inspect)


def _add_explain(commands: Any) -> None:
    about = (
        "Reads a console log of Forge, an old Forge or Forge Neo and says what happened to LoRAs and memory, and what to change. "
        "Nothing of the log is kept or sent."
    )
    explain = commands.add_parser("explain", help="what a console log shows, and what to change", description=about)
    explain.add_argument("log", metavar="FILE", help="the log as a text file; - reads what is piped in")
    _add_common(explain, _explain)


def _add_bake(commands: Any) -> None:
    about = (
        "Merges LoRAs into a model and writes the result as a new checkpoint, a tensor at a time: RAM for a few weights and "
        "the LoRAs is enough. Weights are computed in fp32 and rounded once, everything else is copied bit for bit."
    )
    bake = commands.add_parser("bake", help="merge LoRAs into a new checkpoint file", description=about)
    bake.add_argument(
        "model", metavar="MODEL", type=arguments.model, help="checkpoint or transformer, safetensors or GGUF"
    )
    bake.add_argument(
        "loras",
        metavar="LORA[:STRENGTH]",
        nargs="+",
        type=arguments.typed(arguments.lora),
        help="LoRA file, and its strength after a colon (default 1)",
    )
    bake.add_argument("-o", "--output", metavar="OUT", type=Path, required=True, help="new file, *.safetensors")
    bake.add_argument(
        "--dtype",
        choices=_BAKE_DTYPES,
        default="keep",
        help="of the new file; keep: each tensor its own, bf16 for GGUF and 4-bit weights (default)",
    )
    bake.add_argument("--force", action="store_true", help="replace OUT where it is there already")
    _add_common(bake, _bake)


def _add_simulate(commands: Any) -> None:
    about = (
        "Recomputes what users' logs show about memory with the host's own arithmetic: 54 reported configurations, each with "
        "its numbers or with the reason why there is nothing to recompute, and what the guard is predicted to make of it."
    )
    simulate = commands.add_parser(
        "simulate", help="field reports, recomputed with Forge's arithmetic", description=about
    )
    simulate.add_argument(
        "--row", type=arguments.typed(arguments.row), metavar="N", help="one configuration with all its numbers"
    )
    simulate.add_argument("--markdown", action="store_true", help="print the page docs/replay.md")
    simulate.add_argument("--write", type=Path, metavar="FILE", help="with --markdown: write the page to FILE")
    simulate.set_defaults(usage_error=simulate.error)
    _add_common(simulate, _simulate)


def _add_demo(commands: Any) -> None:
    about = (
        "Makes a Flux-shaped model of 110 M parameters in bf16, fp8, NF4 and GGUF Q4_0 and a LoRA file for it, applies the "
        "LoRA by the guard and by merging, and prints what each costs and what is left of the LoRA. Under a minute on two "
        "free cores, 2 GB of RAM, no GPU."
    )
    demo = commands.add_parser("demo", help="one LoRA in four formats, by the guard and merged", description=about)
    demo.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    _add_debug(demo)
    demo.set_defaults(run=_demo)


def _add_doctor(commands: Any) -> None:
    about = (
        "Says what this machine looks like to the guard: versions, memory with the source of each number, what the CUDA "
        "allocator can be told, which memory estimates were corrected by measured peaks, and how the last process died, if "
        "it did. With --reset it forgets what was measured and does nothing else."
    )
    doctor = commands.add_parser("doctor", help="what the guard knows of this machine", description=about)
    doctor.add_argument("--reset", action="store_true", help="forget what was measured on this machine")
    doctor.add_argument(
        "--data", type=Path, metavar="FOLDER", help="where the guard keeps its files (default: data beside the package)"
    )
    _add_common(doctor, _doctor)


def _add_common(command: argparse.ArgumentParser, run: Callable[[Any], None]) -> None:
    command.add_argument("--json", action="store_true", help="print one JSON document")
    _add_debug(command)
    command.set_defaults(run=run)


def _add_debug(command: argparse.ArgumentParser) -> None:
    # Accepted after the command's name too. SUPPRESS keeps the value given before the name.
    command.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)


def _plan(options: Any) -> None:
    from .commands.plan import PlanRequest, make_plan
    from .commands.plan_machine import machine_for
    from .planning.mode import Wish
    from .planning.tokens import Picture

    width, height = options.resolution
    picture = Picture(width, height, options.batch)
    try:
        machine = machine_for(options.vram, options.ram, options.gpu)
    except ValueError as error:
        options.usage_error(in_users_language(reason(error)))
    request = PlanRequest(
        options.model,
        options.loras,
        machine.vram_bytes,
        machine.ram_bytes,
        picture,
        machine.rates,
        Wish(options.mode),
        options.beside,
    )
    result = make_plan(request)
    if options.json:
        from .commands.plan_json import plan_document

        _print_json(plan_document(result) | {"notes": [str(note) for note in machine.notes]})
    else:
        from .commands.plan_text import print_plan

        print_plan(_console(), result, machine.notes, users_language())
    result.check_usable()


def _inspect(options: Any) -> None:
    from .commands.inspect import check_fits, inspect, inspect_document, print_facts

    found = inspect(options.lora, options.model)
    if options.json:
        _print_json(inspect_document(*found))
    else:
        print_facts(_console(), *found, users_language())
    check_fits(*found)


def _explain(options: Any) -> None:
    from .commands.explain import explain_document, print_explanation, read_log
    from .explaining import explain

    explanation = explain(read_log(options.log))
    if options.json:
        _print_json(explain_document(explanation))
    else:
        print_explanation(_console(), explanation, users_language())


def _bake(options: Any) -> None:
    from rich.console import Console

    from .baking import DTYPES
    from .commands.bake import BakeRequest, bake_document, make_baked, print_baked

    request = BakeRequest(options.model, options.loras, options.output, DTYPES[options.dtype], options.force)
    result = make_baked(request, Console(stderr=True))
    if options.json:
        _print_json(bake_document(result))
    else:
        print_baked(_console(), result, users_language())


def _simulate(options: Any) -> None:
    from .commands.simulate import simulate, simulate_document
    from .replay.guard_case import guard_outcome

    if options.write is not None and not options.markdown:
        options.usage_error(in_users_language(Message("command.page_flag")))
    if options.markdown and (options.row is not None or options.json):
        options.usage_error(in_users_language(Message("command.whole_page")))
    replays = simulate(options.row, guard_outcome)
    if options.json:
        _print_json(simulate_document(replays))
    elif options.markdown:
        _page(replays, options.write)
    else:
        from .commands.simulate_text import print_detail, print_overview

        if options.row is None:
            print_overview(_console(), replays)
        else:
            print_detail(_console(), replays[0])


def _page(replays: Any, target: Path | None) -> None:
    from .commands.simulate_page import page

    text = page(replays)
    if target is None:
        print(text, end="")
    else:
        # Written as bytes, so that line ends are the same on every system.
        target.write_bytes(text.encode("utf-8"))


def _demo(options: Any) -> None:
    from .demo.run import run_demo

    run_demo(_console(), options.markdown, language=users_language())


def _doctor(options: Any) -> None:
    from .commands import doctor

    data = options.data or doctor.DATA
    language = users_language()
    if options.reset:
        forgotten = doctor.forget(data)
        if options.json:
            _print_json(doctor.forgotten_document(data, forgotten))
        else:
            doctor.print_forgotten(_console(), data, forgotten, language)
        return
    found = doctor.examine(data)
    if options.json:
        _print_json(doctor.examination_document(found))
    else:
        doctor.print_examination(_console(), found, language)


def _console() -> Any:
    from rich.console import Console

    return Console()


def _print_json(document: dict[str, Any]) -> None:
    import json

    print(json.dumps(document, indent=2))
