"""The tab with the answer of a real WebUI, recorded there, on a page of its own: for the pictures in docs.

    python tests/support/replayed_page.py --picture docs/face-tab.png
    python tests/support/replayed_page.py --language zh --dark --picture docs/face-tab-zh.png

Another recording is taken in the middle of an image, on a machine with a card, in one language, and given as `--answer`:

    curl -H "Accept-Language: en" http://127.0.0.1:7860/lora-guard/panel > answer.json

Needs fastapi, uvicorn, playwright and Debian's chromium; Chinese needs a font with the characters.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fastapi import FastAPI
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse

from lib_lora_guard.messages.catalogue import LANGUAGES
from lib_lora_guard.reporting.curve import COLUMNS
from lib_lora_guard.ui.route import PATH
from support.face_server import Served, chromium, playwright
from support.recorded_answer import RECORDED, answer_in
from support.small_picture import save
from support.standalone import PAGE, ROOT

VRAM, PROMISED = COLUMNS.index("vram_mb"), COLUMNS.index("promised_mb")
OTHERS = 1
"""The place of other programs in the bar of the card."""
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]


def replayed(answer: dict[str, Any]) -> FastAPI:
    """Returns an app that always gives the same answer."""
    app = FastAPI()
    app.add_api_route(PATH, lambda: JSONResponse(answer), methods=["GET"], response_model=None)
    app.add_api_route("/", lambda: HTMLResponse(PAGE), methods=["GET"], response_model=None)

    @app.get("/{path:path}", response_model=None)
    def file(path: str) -> FileResponse:
        return FileResponse(ROOT / path)

    return app


def without(answer: dict[str, Any], mb: float) -> dict[str, Any]:
    """Takes away what another process held of a large card, so that the rest is a small one."""

    def less(value: float | None) -> float | None:
        return None if value is None else max(0.0, round(value - mb, 1))

    curve = answer["curve"]
    for sample in curve["samples"]:
        sample[VRAM], sample[PROMISED] = less(sample[VRAM]), less(sample[PROMISED])
    for image in curve["images"]:
        image["peak_mb"], image["promised_mb"] = less(image["peak_mb"]), less(image["promised_mb"])
    curve["vram_total_mb"] = less(curve["vram_total_mb"])
    status = answer["status"]
    card = status["memory"][0]
    card["total_mb"], card["used"][OTHERS]["mb"] = less(card["total_mb"]), less(card["used"][OTHERS]["mb"])
    card["numbers"], status["programs"] = [], None
    return answer


def take(app: FastAPI, picture: Path, width: int, dark: bool, opened: bool) -> None:
    """Takes a picture of the page."""
    with Served(app) as server, playwright().sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium(), args=FLAGS)
        page = browser.new_page(viewport={"width": width, "height": 900})
        page.goto(server.url + ("/?__theme=dark" if dark else "/"))
        page.click("#show_guard")
        page.wait_for_selector("#lora_guard_panel .lg-state[data-state=live]")
        if opened:
            page.locator(".lg-fold").first.click()
        save(page.locator("#lora_guard_panel").screenshot(), picture)
        browser.close()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--answer", type=Path, default=RECORDED)
    parser.add_argument("--language", choices=LANGUAGES, default="en", help="that of the answer, if it has sentences")
    parser.add_argument("--picture", type=Path, required=True)
    parser.add_argument("--width", type=int, default=1100)
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--without-mb", type=float, default=0, help="VRAM of another process, to play a smaller card")
    parser.add_argument("--opened", action="store_true", help="unfold the details of the first LoRA")
    given = parser.parse_args(arguments)
    answer = answer_in(given.language, given.answer)
    if given.without_mb:
        answer = without(answer, given.without_mb)
    take(replayed(answer), given.picture, given.width, given.dark, given.opened)


if __name__ == "__main__":
    main()
