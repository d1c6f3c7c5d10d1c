"""`lora-guard demo`: one LoRA on a Flux-shaped model in four formats, applied by the guard and by merging."""

from __future__ import annotations

import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text
from safetensors.torch import save_file

from ..hosts.plain.guard import LoraGuard
from ..messages import Message
from ..messages.catalogue import ENGLISH
from ..units import MB
from ..version import __version__
from ..weights import Codec, Nf4Codec, PlainCodec, Q4_0Codec, ScaledFp8Codec, StoredLinear
from .measure import Measured, answers, measured, model_bits, share_present
from .merging import MergingPatcher
from .model import FluxShape, FluxShaped, lora_layers, random_inputs

RANK, ALPHA = 16, 8.0
STRENGTH, CHANGED_STRENGTH = 1.0, 0.6
DELTA_SHARE = 0.02
"""rms of the delta over rms of the weight, as in the measurements that the design is based on."""
TOKENS, TEXT_TOKENS = 128, 32
PROBED_LAYERS = 8

CODECS: dict[str, Callable[[], Codec]] = {
    "bf16": lambda: PlainCodec(torch.bfloat16, "bf16"),
    "fp8": ScaledFp8Codec,
    "NF4": Nf4Codec,
    "GGUF Q4_0": Q4_0Codec,
}
STEPS_PER_FORMAT = 11
TOLD = "NF4"
"""The format of the sentence on the result."""


@dataclass
class Row:
    """The result of one way on one format."""

    format: str
    way: str
    apply: Measured
    change: Measured
    remove: Measured
    forward_without_seconds: float
    forward_with_seconds: float
    share: float
    share_changed: float
    restored: bool

    @property
    def ram_peak_mb(self) -> float:
        """The higher peak of applying and changing."""
        return max(self.apply.ram_peak_mb, self.change.ram_peak_mb)

    def cells(self) -> list[str]:
        """Returns the row's table cells."""
        return [
            self.format,
            self.way,
            f"{self.apply.seconds:.3f}",
            f"{self.change.seconds:.3f}",
            f"{self.remove.seconds:.3f}",
            f"{self.forward_without_seconds:.2f}→{self.forward_with_seconds:.2f}",
            f"{self.ram_peak_mb:.0f}",
            f"{100 * self.share:.0f} / {100 * self.share_changed:.0f}",
            "yes" if self.restored else "NO",
        ]


COLUMNS = ("format", "way", "apply s", "change s", "remove s", "forward s", "RAM MB", "LoRA %", "exact")
VERDICT = (
    "RAM is what the merging way needs on top of the model, and it grows with the model; the guard's grows with the LoRA "
    "alone. Where the LoRA column is far below 100, the picture hardly shows it."
)
LEGEND = (
    "forward: without → with the LoRA; RAM: peak above the model; "
    f"LoRA: how much of it the layers show at strength {STRENGTH:g} / {CHANGED_STRENGTH:g}; exact: weights restored bit for bit."
)


def run_demo(
    console: Console, markdown: bool = False, shape: FluxShape | None = None, language: str = ENGLISH
) -> list[Row]:
    """Runs all formats, prints one table and a sentence on the result, and returns the table's rows.

    Args:
        console: Receives the table.
        markdown: Prints the table as Markdown.
        shape: The model's sizes; None takes the demo's.
        language: Of the sentence.
    """
    shape = shape or FluxShape()
    # On stderr, so that stdout contains only the table.
    progress = Progress(
        TextColumn("{task.description:32}"),
        BarColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder, progress, torch.inference_mode():
        task = progress.add_task("making the model and the LoRA", total=len(CODECS) * STEPS_PER_FORMAT)
        path = Path(folder) / "style.safetensors"
        deltas = write_lora(path, shape)
        lora_mb = path.stat().st_size / MB
        for name, codec in CODECS.items():

            def step(what: str, name: str = name) -> None:
                progress.update(task, description=f"{name}: {what}", advance=1)

            rows += _run_format(name, codec(), shape, path, deltas, step)
    millions = sum(p.numel() for p in _meta_model(shape).parameters()) / 1e6
    caption = (
        f"{millions:.0f} M parameters, LoRA of rank {RANK} on {len(lora_layers(_meta_model(shape)))} layers ({lora_mb:.1f} MB), "
        f"{TOKENS}+{TEXT_TOKENS} tokens, {torch.get_num_threads()} threads of {_processor()}, {psutil.virtual_memory().total / MB / 1024:.0f} GB RAM, "
        f"torch {torch.__version__}, Python {platform.python_version()}, LoRA Guard {__version__}"
    )
    _print(console, rows, caption, markdown)
    if not markdown:
        console.print(Text(result(rows).text(language), style="bold"), highlight=False)
    return rows


def result(rows: list[Row]) -> Message:
    """Returns the result in one sentence, of the format that loses most by merging."""
    guard, merging = (next(r for r in rows if (r.format, r.way) == (TOLD, way)) for way in ("guard", "merging"))
    facts = {
        "format": TOLD,
        "guard_seconds": guard.change.seconds,
        "merging_seconds": merging.change.seconds,
        "guard_mb": guard.ram_peak_mb,
        "merging_mb": merging.ram_peak_mb,
        "guard_percent": 100 * guard.share,
        "merging_percent": 100 * merging.share,
    }
    return Message("demo.result", facts)


def write_lora(path: Path, shape: FluxShape) -> dict[str, torch.Tensor]:
    """Writes a kohya file for the model. Returns the true deltas (fp64, `(out, in)`) of the probed layers, by layer
    name.
    """
    layers = lora_layers(_meta_model(shape))
    probed = set(list(layers)[:: max(1, len(layers) // PROBED_LAYERS)])
    generator = torch.Generator().manual_seed(7)
    tensors, deltas = {}, {}
    for name, (outputs, inputs) in layers.items():
        # torch's initialisation gives weights an rms of 1 / sqrt(3 * inputs).
        wanted = DELTA_SHARE / (3 * inputs) ** 0.5
        size = (wanted * RANK / ALPHA / RANK**0.5) ** 0.5
        up = (torch.randn(outputs, RANK, generator=generator) * size).to(torch.bfloat16)
        down = (torch.randn(RANK, inputs, generator=generator) * size).to(torch.bfloat16)
        key = "lora_unet_" + name.replace(".", "_")
        tensors[f"{key}.lora_up.weight"], tensors[f"{key}.lora_down.weight"] = up, down
        tensors[f"{key}.alpha"] = torch.tensor(ALPHA)
        if name in probed:
            deltas[name] = ALPHA / RANK * (up.double() @ down.double())
    save_file(tensors, str(path))
    return deltas


def build_model(codec: Codec, shape: FluxShape) -> FluxShaped:
    """Returns the model with every matrix of its blocks stored by `codec`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = FluxShaped(shape).requires_grad_(False)
    for name in lora_layers(model):
        owner, _, child = name.rpartition(".")
        linear = model.get_submodule(name)
        assert isinstance(linear, torch.nn.Linear)
        model.get_submodule(owner).add_module(child, StoredLinear(codec, linear.weight.data, linear.bias.data))
    return model


def _run_format(
    name: str, codec: Codec, shape: FluxShape, path: Path, deltas: dict[str, torch.Tensor], step: Callable[[str], None]
) -> Iterator[Row]:
    step("encoding the model")
    model = build_model(codec, shape)
    inputs = random_inputs(shape, TOKENS, TEXT_TOKENS, torch.float32)
    layers = {layer: (int(d.shape[0]), int(d.shape[1])) for layer, d in deltas.items()}
    changed_deltas = {layer: CHANGED_STRENGTH * d for layer, d in deltas.items()}
    bits, without = model_bits(model), answers(model, layers)
    guard, merging = LoraGuard(model), MergingPatcher(model)
    ways: dict[str, tuple[Callable[[float], object], Callable[[], object]]] = {
        "guard": (lambda strength: guard.apply([(path, strength)]), guard.remove),
        "merging": (lambda strength: merging.apply(path, strength), merging.remove),
    }
    for way, (apply, remove) in ways.items():
        # Measured again for each way: the load of the machine changes.
        step(f"forward without LoRA ({way})")
        forward_without = _forward_seconds(model, inputs)
        step(f"applying ({way})")
        with measured() as applied:
            apply(STRENGTH)
        share = share_present(without, answers(model, layers), deltas)
        step(f"forward with LoRA ({way})")
        forward_with = _forward_seconds(model, inputs)
        step(f"changing the strength ({way})")
        with measured() as changed:
            apply(CHANGED_STRENGTH)
        share_changed = share_present(without, answers(model, layers), changed_deltas)
        step(f"removing ({way})")
        with measured() as removed:
            remove()
        restored = model_bits(model) == bits
        yield Row(name, way, applied, changed, removed, forward_without, forward_with, share, share_changed, restored)


def _forward_seconds(model: FluxShaped, inputs: tuple[torch.Tensor, ...]) -> float:
    """Returns the faster of two passes; the first one also faults memory in that was returned to the system."""
    seconds = []
    for _ in range(2):
        started = time.perf_counter()
        model(*inputs)
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def _meta_model(shape: FluxShape) -> FluxShaped:
    with torch.device("meta"):
        return FluxShaped(shape)


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _print(console: Console, rows: list[Row], caption: str, markdown: bool) -> None:
    if markdown:
        for line in (COLUMNS, ["---"] * len(COLUMNS), *(row.cells() for row in rows)):
            print("| " + " | ".join(line) + " |")
        print(f"\n{LEGEND} {VERDICT}\n\n{caption}")
        return
    table = Table(
        box=SIMPLE_HEAD, pad_edge=False, padding=0, caption=f"{LEGEND}\n{VERDICT}\n{caption}", caption_justify="left"
    )
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in ("format", "way") else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row.cells(), end_section=row.way == "merging")
    console.print(table)
