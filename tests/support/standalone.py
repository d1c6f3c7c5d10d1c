"""The tab on a page of its own, without Forge, with made-up images: `python tests/support/standalone.py`.

For tests and for developers. Needs fastapi and uvicorn (the extra `test`).
"""

import argparse
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI
from fastapi.responses import FileResponse, HTMLResponse, Response

from lib_lora_guard.memory import HostMemory, MemorySnapshot, Reading, take_snapshot
from lib_lora_guard.memory.nvml import GpuProcess, GpuProcesses
from lib_lora_guard.messages import Message
from lib_lora_guard.planning.last_plan import LastPlan
from lib_lora_guard.reporting.bug_report import bug_report
from lib_lora_guard.reporting.headline import Scene, headline, problems
from lib_lora_guard.reporting.lora_rows import FileSheet, lora_rows
from lib_lora_guard.reporting.report import ApplyReport, LoraReport
from lib_lora_guard.reporting.ring import LogRing
from lib_lora_guard.reporting.status import PanelStatus, model_status
from lib_lora_guard.reporting.timeline import Levels, Timeline
from lib_lora_guard.settings import Language
from lib_lora_guard.ui.memory_figures import memory_figures, other_programs, step_need
from lib_lora_guard.ui.panel import Panel
from lib_lora_guard.ui.route import PATH, add_route
from lib_lora_guard.ui.tab import PLACE, TITLE
from lib_lora_guard.units import MB
from lib_lora_guard.version import __version__

ROOT = Path(__file__).resolve().parents[2]

SCRIPTS = "\n".join(
    f'<script src="javascript/{file.name}"></script>' for file in sorted((ROOT / "javascript").glob("*.js"))
)

PAGE = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{TITLE}</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="style.css">
<style>
  body {{ background: #fff; font-family: system-ui, sans-serif; margin: 1em; }}
  body.dark {{
    background: #0b0f19; color: #f3f4f6; color-scheme: dark;
    --body-text-color: #f3f4f6; --body-text-color-subdued: #9ca3af; --block-background-fill: #1f2937;
    --background-fill-primary: #0b0f19; --background-fill-secondary: #111827; --border-color-primary: #374151;
    --button-secondary-background-fill: #4b5563; --button-secondary-text-color: #fff; --color-accent: #f97316;
  }}
  nav {{ display: flex; gap: 0.5em; margin-bottom: 1em; }}
</style>
{SCRIPTS}
</head>
<body>
<nav><button id="show_other">Txt2img</button><button id="show_guard">{TITLE}</button><button id="generate">Generate</button></nav>
<div id="other">An image would be here.</div>
<div id="guard" style="display: none">{PLACE}</div>
<script>
  if (location.search.includes("__theme=dark")) document.body.classList.add("dark");
  const show = (guard) => {{
    document.getElementById("guard").style.display = guard ? "block" : "none";
    document.getElementById("other").style.display = guard ? "none" : "block";
  }};
  document.getElementById("show_guard").addEventListener("click", () => show(true));
  document.getElementById("show_other").addEventListener("click", () => show(false));
  document.getElementById("generate").addEventListener("click", () => fetch("generate", {{ method: "POST" }}));
</script>
</body>
</html>
"""


class MadeUpTime:
    """The module `time`, as far as a `Standalone` needs it, for tests: time passes by `sleep` alone, and at once."""

    def __init__(self) -> None:
        self._now = 1_800_000_000.0

    def time(self) -> float:
        """Returns seconds since 1970."""
        return self._now

    def sleep(self, seconds: float) -> None:
        """Lets so many seconds pass."""
        self._now += seconds


class Standalone:
    """A host for the tab that owns no model. `asked` counts the tab's requests; `reports`, `left_out`, `vram_free_mb` and
    `language` may be set.
    """

    def __init__(self, language: Language = Language.AUTO, time: Any = time) -> None:
        """
        Args:
            language: The setting.
            time: Has `time` and `sleep`. The images and the log have their times from here.
        """
        self.language = language
        self.time = time
        self.reports: list[ApplyReport] = []
        self.left_out: dict[str, str] = {}
        self.asked = 0
        self.done: list[str] = []
        self.step_seconds = 0.25
        self.vram_free_mb = 3900
        self.timeline = Timeline(time.time)
        self.steps: tuple[int, int] | None = None
        self.crash: list[str] = []
        self._machine = HostMemory()
        self.log = logging.Logger(f"{__name__}.made_up", logging.DEBUG)
        self.log.addFilter(self._stamp)
        self.ring = LogRing()
        self.log.addHandler(self.ring)
        self.app = FastAPI()
        self._add_routes()

    def generate(self, steps: int = 20) -> None:
        """Logs the lines of an image with two LoRAs, one after another, and draws its curve."""
        timeline = self.timeline
        self._work(steps=0.5)
        timeline.enter("load_checkpoint", levels(1300, 9000))
        self._work(steps=7)
        timeline.leave("load_checkpoint", levels(1300, 16200))
        timeline.begin_image()
        report = made_up_report()
        self.reports = [report, made_up_text_report()]
        self.left_out = {"flux_style.safetensors": "made for SD 1.x, this is Flux; use a LoRA for Flux"}
        self.log.info("%s", report.line())
        timeline.enter("encode_prompt", levels(1300, 16300))
        self._work(steps=2)
        timeline.leave("encode_prompt", levels(6100, 16500))
        timeline.enter("move_to_gpu", levels(6100, 16500))
        self._work(steps=3)
        timeline.leave("move_to_gpu", levels(7050, 16900), 8600 * MB)
        for step in range(steps):
            self.steps = (step, steps)
            timeline.enter("sampling_step", levels(8020 + 60 * (step > 0), 16900))
            self._work(steps=1)
            self.log.log(
                logging.WARNING if step % 10 == 7 else logging.DEBUG if step % 3 == 1 else logging.INFO,
                "step %d of %d",
                step + 1,
                steps,
            )
        timeline.enter("vae_decode", levels(8080, 16900))
        self._work(steps=2.5)
        timeline.leave("vae_decode", levels(9420, 16900))
        timeline.end_image(levels(7100, 16900))
        self.steps = None

    def _work(self, steps: float) -> None:
        """Lets as much time pass as so many steps of an image take."""
        self.time.sleep(steps * self.step_seconds)

    def _stamp(self, record: logging.LogRecord) -> bool:
        record.created = self.time.time()
        return True

    def status(self) -> PanelStatus:
        snapshot = made_up_card(take_snapshot(torch.device("cpu"), host=self._machine), self.vram_free_mb)
        last = next((image for image in reversed(self.timeline.images()) if image.ended is not None), None)
        rows = lora_rows(self.reports, self.left_out, SHEETS)
        model = "flux1-dev-bnb-nf4-v2" if self.reports else None
        return PanelStatus(
            mode=Message("settings.mode.automatic"),
            enabled=True,
            version=__version__,
            headline=headline(Scene(self.timeline.now(), self.steps, model, len(rows), last)),
            problems=problems({row.name: row.refused for row in rows if row.refused}, self.crash, "1"),
            models=tuple(model_status(report) for report in self.reports),
            loras=rows,
            memory=memory_figures(snapshot),
            step=step_need(MADE_UP_PLAN if self.reports else None),
            programs=other_programs(snapshot, MADE_UP_PROGRAMS),
        )

    def do(self, name: str, language: str) -> str | None:
        self.done.append(name)
        return f"{name} was done"

    def report(self) -> str:
        return bug_report([("LoRA Guard", __version__)], self.ring.since(0))

    def files(self) -> dict[str, list[str]]:
        return {"checkpoints": ["flux1-dev-fp8", "sdxl"], "loras": ["pose_xl", "style"]}

    def will_it_fit(self, checkpoint: str, loras: list[str], language: str) -> dict[str, object]:
        return {"fits": bool(loras), "lines": [f"{checkpoint} with {', '.join(loras)}"]}

    def _add_routes(self) -> None:
        self.panel = Panel(self.status, lambda: (self.language, None), lambda: self.ring, lambda: self.timeline)
        add_route(self.app, self.panel, self)

        @self.app.middleware("http")
        async def count(request, call_next):
            self.asked += request.url.path == PATH
            return await call_next(request)

        self.app.add_api_route("/", lambda: HTMLResponse(PAGE), methods=["GET"], response_model=None)
        for name in ("style.css", *(f"javascript/{file.name}" for file in (ROOT / "javascript").glob("*.js"))):
            self.app.add_api_route(f"/{name}", _file(ROOT / name), methods=["GET"], response_model=None)

        def generate() -> Response:
            threading.Thread(target=self.generate, daemon=True).start()
            return Response(status_code=204)

        self.app.add_api_route("/generate", generate, methods=["POST"], response_model=None)


SHEETS = {
    "style.safetensors": FileSheet("Flux", (16,), ("LoRA",), 38.0, 0.0),
    "pose_xl.safetensors": FileSheet("SDXL", (8, 4), ("LoKr",), 12.4),
    "flux_style.safetensors": FileSheet("SD 1.x", (32,), ("LoRA", "DoRA"), 144.0),
}


def levels(vram_mb: int, ram_mb: int) -> Levels:
    """Returns a made-up card of 12 GB and a machine of 32 GB with this much in use."""
    return Levels(vram_mb * MB, 12288 * MB, ram_mb * MB, 32768 * MB)


MADE_UP_PLAN = LastPlan("KModel", 6480 * MB, 5750 * MB, 331 * MB, 1530 * MB)
MADE_UP_PROGRAMS = GpuProcesses((GpuProcess(1, "browser", 640 * MB), GpuProcess(2, "game launcher", 210 * MB)))


def made_up_card(snapshot: MemorySnapshot, free_mb: int) -> MemorySnapshot:
    """Replaces the machine's card by one of 12 GB; RAM is the real one."""
    driver, nvml, torchs = Message("readings.driver"), Message("readings.nvml"), Message("readings.torch")
    return replace(
        snapshot,
        vram_total=Reading(12288 * MB, driver),
        vram_free=Reading(4660 * MB, driver),
        vram_free_nvml=Reading(free_mb * MB, nvml),
        vram_reserved=Reading(6900 * MB, torchs),
        vram_active=Reading(6110 * MB, torchs),
        vram_ours=Reading(7220 * MB, nvml),
        vram_others=Reading(850 * MB, Message("readings.computed")),
    )


def made_up_report() -> ApplyReport:
    """Returns the report of a Flux model with two LoRAs, one of which does not fit."""
    style = LoraReport("style.safetensors", 0.8, 38 * MB, 304, modes=Counter({"bypass": 290, "on_the_fly": 14}))
    style.reasons = {"bypass": {"low rank"}, "on_the_fly": {"no layer call"}}
    other = LoraReport("pose_xl.safetensors", 1.0, refused="made for SDXL, this is Flux; use a LoRA for Flux")
    return ApplyReport("KModel", [style, other], 38 * MB, 38 * MB, 21.4, "cuda:0")


def made_up_text_report() -> ApplyReport:
    """Returns what the text encoder has of the same LoRAs."""
    style = LoraReport("style.safetensors", 0.8, 4 * MB, 72, ["te.extra"], modes=Counter({"bypass": 72}))
    style.reasons = {"bypass": {"low rank"}}
    return ApplyReport("JointTextEncoder", [style], 4 * MB, 4 * MB, 3.2, "cuda:0")


def _file(path: Path) -> Callable[[], FileResponse]:
    return lambda: FileResponse(path)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=7899)
    parser.add_argument("--language", choices=[known.value for known in Language], default="auto")
    given = parser.parse_args(arguments)
    page = Standalone(Language(given.language))
    uvicorn.run(page.app, host="127.0.0.1", port=given.port, log_level="warning")


if __name__ == "__main__":
    main()
