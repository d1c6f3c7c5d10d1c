"""What hosts print about LoRAs and memory, as patterns: what of a log is looked at.

Read in the sources of Forge dfdcbab6 (2025-06) and of Forge Neo 2.26 (5692d2d2); lines of older Forges as reports on GitHub
quote them (2024-02 to 2024-09), those of torch in its own messages. Sizes are MB where the host says MB; torch counts MiB.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

_NUMBER = r"-?\d{1,20}(?:\.\d{1,20})?"
"""Bounded: a long run of digits is no number of a host, and is not tried from each of its digits to its end."""
_PLACE = re.compile(r"(?<!P)<(\w+)>")


@dataclass(frozen=True)
class HostLine:
    """One kind of line. `mark` is plain text that every such line has; the groups of `pattern` are the facts."""

    name: str
    mark: str
    pattern: re.Pattern[str]


def _line(name: str, mark: str, pattern: str | None = None) -> HostLine:
    """Makes a line. `pattern` may write <n> for a number that becomes the fact `n`; None takes the mark alone."""
    text = re.escape(mark) if pattern is None else _PLACE.sub(lambda found: f"(?P<{found[1]}>{_NUMBER})", pattern)
    return HostLine(name, mark, re.compile(text))


LINES: tuple[HostLine, ...] = (
    # The machine.
    _line("machine", "Total VRAM", r"Total VRAM <vram> MB, total RAM <ram> MB"),
    _line("torch", "ytorch version", r"ytorch version: (?P<version>[\w.+]{1,40})"),
    _line("torch", "PyTorch Version", r"PyTorch Version: (?P<version>[\w.+]{1,40})"),
    _line("device", "Device: cuda", r"Device: cuda:\d+ (?P<card>[^:]{1,80}?)(?: : (?P<allocator>\w+))?\s*$"),
    _line("guard", "in place of Forge", r"\[LoRA Guard\] (?P<version>\S{1,20}) in place of Forge"),
    _line("guard", "已接管 Forge", r"\[LoRA Guard\] (?P<version>\S{1,20}) 已接管 Forge"),
    _line("neo", "VRAM State:"),
    _line("async_allocator", "Using cudaMallocAsync backend"),
    _line("no_expandable", "expandable_segments not supported on this platform"),
    _line("removed_flag", "is removed in Forge", r"Arg (?P<flag>\S{1,40}) is removed in Forge"),
    # What was chosen.
    _line("settings", "Environment vars changed", r"'stream': (?P<stream>\w+).{0,80}?'inference_memory': <inference>.{0,80}?'pin_shared_memory': (?P<pinned>\w+)"),
    _line("all_weights", "You just set Forge to use 100% GPU memory"),
    _line("online_wish", "Using online LoRAs in FP16:", r"Using online LoRAs in FP16: (?P<online>True|False)"),
    _line("online_wish", "Patch LoRAs on-the-fly:", r"Patch LoRAs on-the-fly: (?P<online>True|False)"),
    # The model.
    _line("loading", "Loading Model:"),
    _line("model_loaded", "Model loaded in"),
    _line("stored", "Using Detected UNet Type:", r"Using Detected UNet Type: (?:torch\.)?(?P<storage>\w+)"),
    _line("stored", "Using Detected Model Data Type:", r"Using Detected Model Data Type: (?:torch\.)?(?P<storage>\w+)"),
    _line("stored", "storage_dtype", r"K-Model Created: \{'storage_dtype': (?:torch\.)?'?(?P<storage>\w+)"),
    _line("stored", "Diffusion Model: {", r"Diffusion Model: \{'?storage'?: '?(?:torch\.)?(?P<storage>\w+)"),
    _line("gguf", "GGUF state dict:", r"GGUF state dict: \{(?P<types>[^}]{0,400})"),
    # Placement.
    _line("placed", "[Memory Management] Target:", r"Target: (?P<model>\w+), Free GPU: <free> MB, Model Require: <require> MB, Previously Loaded: <before> MB, Inference Require: <inference> MB, Remaining: <remaining> MB"),
    _line("placed_old", "Estimated Remaining GPU Memory", r"Estimated Remaining GPU Memory(?:: | \(MB\) = +)<remaining>"),
    _line("loads_old", "To load target model", r"To load target model (?P<model>\w+)"),
    _line("loads_neo", "Requested to load", r"Requested to load (?P<model>\w+)"),
    _line("swapped", "Swap Loaded", r"(?P<where>CPU|Shared) Swap Loaded \((?P<how>\w+) method\): <swapped> MB, GPU Loaded: <loaded> MB"),
    _line("swapped", "loaded partially;", r"loaded partially; (?:<usable> MB usable, )?<loaded> MB loaded, <swapped> MB offloaded"),
    _line("unloads", "Trying to free", r"Trying to free (?P<wanted>\d+(?:\.\d+)?|all memory)(?: MB)?"),
    _line("unloading", "Trying to free", r"^.{0,200}?Trying to free (?!.{0,600}(?:Done\.|HTTP))"),
    _line("moved", "Moving model(s) has taken", r"Moving model\(s\) has taken <seconds> seconds"),
    _line("loaded_now", "loaded completely;"),
    _line("loaded_now", "loaded partially;"),
    _line("cleaned", "Memory cleanup has taken"),
    _line("patched", "LoRA patching has taken", r"LoRA patching has taken <seconds> seconds"),
    _line("patching", "Patching LoRAs for", r"Patching LoRAs for (?P<model>\w+):\s+<percent>%"),
    _line("low_vram", "[Low GPU VRAM Warning] Your current", r"Your current GPU free memory is <free> MB"),
    _line("leak", "memory leak detected", r"memory leak detected with model (?P<model>\w+)"),
    _line("leak", "Memory Leak with", r"Memory Leak with model (?P<model>\w+)"),
    # LoRAs.
    _line("loaded", "[LORA] Loaded", r"\[LORA\] Loaded (?P<file>.{1,300}?) for (?P<model>\w+)-(?P<part>UNet|CLIP) with <keys> keys at weight <strength> \(skipped <skipped> keys\)(?: with on_the_fly = (?P<online>True|False))?"),
    _line("other_model", "mismatch for", r"\[LORA\] LoRA (?:version )?mismatch for \w+: (?P<file>.{1,300}?)\s*$"),
    _line("unmatched", "unmatched keys", r"\[LORA\] Loading (?P<file>.{1,300}?) for \w+ with (?:unmatched keys \[(?P<list>.*)|<keys> unmatched keys)"),
    _line("mismatched", "keys mismatched in", r"\[LORA\] Mismatch (?P<file>.{1,300}?) for \w+-(?:UNet|CLIP) with <keys> keys mismatched in <of> keys"),
    _line("not_loaded", "lora key not loaded", r"lora key not loaded:? (?P<key>\S{1,200})"),
    _line("shape", "WEIGHT NOT MERGED", r"SHAPE MISMATCH (?P<key>\S{1,200}) WEIGHT NOT MERGED"),
    _line("odd_patch", "patch type not recognized", r"patch type not recognized (?P<kind>\S{1,60})"),
    _line("odd_patch", "is not recognized", r"of type \"(?P<kind>[^\"]{1,60})\" is not recognized"),
    _line("odd_patch", "Wrong LoRA Key:", r"Wrong LoRA Key: (?P<kind>\S{1,200})"),
    _line("merge_error", "ERROR ", r"ERROR (?P<kind>lora|lokr|loha|glora|boft|oft|diff) (?P<key>\S{1,200}) (?P<why>.{1,400})"),
    _line("merge_error", "Calculate Weight Failed:", r"Calculate Weight Failed: (?P<kind>\w+) (?P<key>\S{1,200})(?P<why>)"),
    _line("merge_retry", "Patching LoRA weights", r"Patching LoRA weights (?:out of memory|failed)\. Retrying by offload"),
    _line("merge_retry", "Out of Memory during LoRA Patching"),
    _line("low_bit", "Low bit LoRA for this data type is not implemented yet"),
    _line("low_bit", "GGUF Tensor is not baked"),
    _line("low_bit", "BNB bad weight without parent layer"),
    _line("stage_failed", "activating extra network lora"),
    _line("no_file", "'NoneType' object has no attribute 'filename'"),
    _line("missing", "Failed to load LoRA:", r"Failed to load LoRA: \"(?P<name>[^\"]{1,200})\""),
    _line("missing", "find network with name", r"[Cc]ouldn't find network with name (?P<name>.{1,200}?)\s*$"),
    _line("missing", "find Lora with name", r"[Cc]ouldn't find Lora with name (?P<name>.{1,200}?)\s*$"),
    # Memory that ends.
    _line("cuda_oom", "out of memory. Tried to allocate", r"out of memory\. Tried to allocate <wanted> (?P<unit>[KMG]iB)"),
    _line("cuda_rest", "by PyTorch, and", r"<allocated> (?P<unit>[MG]iB) is allocated by PyTorch, and <unused> (?P<unused_unit>[KMG]?i?B|bytes) is reserved by PyTorch but unallocated"),
    _line("async_oom", "Allocation on device"),
    _line("driver_oom", "CUDA error: out of memory"),
    _line("ram_oom", "DefaultCPUAllocator", r"you tried to allocate (?P<bytes>\d{1,20}) bytes"),
    _line("page_file", "os error 1455"),
    _line("page_file", "[WinError 1455]"),
    _line("page_file", "paging file is too small"),
    _line("vae_tiled", "Ran out of memory when regular VAE"),
    _line("vae_tiled", "Out of Memory during VAE"),
    _line("attention_sliced", "scaled_dot_product_attention OOMed"),
    _line("attention_sliced", "retrying with Slice Attention"),
    _line("cuda_oom_bare", "_STATUS_ALLOC_FAILED"),
    _line("memory_error", "MemoryError", r"\b_?(?:Array)?MemoryError\b"),
    # Windows says "Press any key" in its own language, and ends it thus in nearly all of them.
    _line("ended", ". . .", r"\. \. \.\s*$"),
    _line("ended", "Press any key to continue"),
    _line("ended", "Appuyez sur une touche"),
    _line("killed", "Killed", r"(?:^|[\s\])|])Killed\s*$|\d\s+Killed\s"),
    _line("stopped", "Interrupted with signal"),
    _line("stopped", "Terminate batch job"),
    _line("stopped", "KeyboardInterrupt"),
    _line("traceback", "Traceback (most recent call last)"),
    _line("crashed", "Windows fatal exception", r"Windows fatal exception: (?P<what>[\w ]{1,60})"),
    _line("crashed", "Fatal Python error", r"Fatal Python error: (?P<what>[\w ]{1,60})"),
    _line("crashed", "Segmentation fault", r"(?P<what>Segmentation fault)"),
    _line("nan", "NansException"),
    _line("nan", "A tensor with NaNs was produced"),
    _line("damaged", "HeaderTooLarge"),
    _line("damaged", "MetadataIncompleteBuffer"),
    _line("damaged", "InvalidHeaderDeserialization"),
    # Progress and our own lines.
    _line("step", "s/it", r"(?:(?P<percent>\d{1,3})%\|.{0,300}?)?\b<seconds>s/it"),
    _line("step_fast", "it/s", r"\b<rate>it/s"),
    _line("ours", "[LoRA Guard] ", r"\[LoRA Guard\] (?P<level>warning|error|critical): (?P<text>.{1,600})"),
    _line("ours", "[LoRA Guard] ", r"\[LoRA Guard\] (?P<text>LG-\w\d\d.{1,600})"),
)  # fmt: skip
_ANY = re.compile("|".join(sorted({re.escape(line.mark) for line in LINES})))
_MOST = 5000
"""Lines of one kind that are kept."""


@dataclass
class Seen:
    """The facts of a log.

    Attributes:
        lines: How many lines were read.
        found: By the name of a line, its facts as text, in order; `at` is the number of the line.
        last: The last line with text in it.
    """

    lines: int = 0
    found: dict[str, list[Mapping[str, str]]] = field(default_factory=dict)
    last: str = ""

    def all(self, name: str) -> list[Mapping[str, str]]:
        """Returns the facts of every line of a kind."""
        return self.found.get(name, [])

    def has(self, name: str) -> bool:
        """Returns True if there is a line of a kind."""
        return name in self.found

    def numbers(self, name: str, fact: str) -> list[float]:
        """Returns one number of every line of a kind that has it."""
        return [float(facts[fact]) for facts in self.all(name) if facts.get(fact)]

    def texts(self, name: str, fact: str) -> list[str]:
        """Returns one text of every line of a kind, each once, in order."""
        return list(dict.fromkeys(facts[fact] for facts in self.all(name) if facts.get(fact)))


def look(lines: Iterable[str]) -> Seen:
    """Finds what hosts print in the lines of a log."""
    seen = Seen()
    for number, line in enumerate(lines, 1):
        seen.lines = number
        seen.last = line
        for host_line, facts in _matches(line) if _ANY.search(line) else ():
            kept = seen.found.setdefault(host_line.name, [])
            if len(kept) < _MOST:
                kept.append({**facts, "at": str(number)})
    return seen


def _matches(line: str) -> Iterator[tuple[HostLine, dict[str, str]]]:
    for host_line in LINES:
        if host_line.mark in line:
            for found in host_line.pattern.finditer(line):
                yield host_line, {name: text or "" for name, text in found.groupdict().items()}
