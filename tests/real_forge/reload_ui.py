"""The web UI in a browser: an image with a LoRA, Reload UI, the same image again, one without, one with it again.

    FORGE_ROOT=... FORGE_PYTHON=... $FORGE_PYTHON tests/real_forge/reload_ui.py [screenshot.png]

Needs playwright in FORGE_PYTHON and Debian's chromium (CHROMIUM names another).
"""

import hashlib
import json
import os
import sys
import tempfile
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from playwright.sync_api import sync_playwright

from real_forge.run import link_extensions
from real_forge.server import Server

CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
ARGUMENTS += ["--disable-component-update", "--disable-sync"]


def open_page(page, url):
    page.goto(url, wait_until="domcontentloaded")
    page.wait_for_selector("#txt2img_prompt textarea", timeout=90_000)
    page.wait_for_timeout(5000)
    for name, value in (("txt2img_steps", "2"), ("txt2img_width", "64"), ("txt2img_height", "64")):
        field = page.locator(f"#{name} input[type=number]")
        field.fill(value)
        field.press("Tab")
    seed = page.locator("#txt2img_seed input")
    seed.fill("1")
    seed.press("Tab")


def generate(page, prompt):
    """The pixels' hash of one generated image."""
    old = page.evaluate("document.querySelector('#txt2img_gallery img')?.src ?? ''")
    page.fill("#txt2img_prompt textarea", prompt)
    page.click("#txt2img_generate")
    page.wait_for_function(
        "old => { const i = document.querySelector('#txt2img_gallery img'); return i && i.src !== old }",
        arg=old,
        timeout=240_000,
    )
    page.wait_for_timeout(1500)
    source = page.evaluate("document.querySelector('#txt2img_gallery img').src")
    from io import BytesIO

    from PIL import Image

    with urllib.request.urlopen(source) as answer:
        return hashlib.sha256(Image.open(BytesIO(answer.read())).convert("RGB").tobytes()).hexdigest()[:12]


def main():
    link_extensions()
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        config = Path(folder) / "config.json"
        config.write_text(json.dumps({"sd_model_checkpoint": "rand_sd15_tiny.safetensors"}))
        with Server(Path(folder) / "web.log", ["--ui-settings-file", str(config)], web=True) as forge:
            page = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS).new_page(
                viewport={"width": 1400, "height": 1000}
            )
            open_page(page, forge.url)
            lora = "a cat <lora:lg_sd15_a:1>"
            seen = {"without": generate(page, "a cat"), "with": generate(page, lora)}
            page.evaluate("document.querySelector('#settings_restart_gradio').click()")
            page.wait_for_timeout(15_000)
            open_page(page, forge.url)
            seen |= {
                "with, after Reload UI": generate(page, lora),
                "without, after Reload UI": generate(page, "a cat"),
                "with again": generate(page, lora),
            }
            if len(sys.argv) > 1:
                page.screenshot(path=sys.argv[1])
            console = forge.console()
    lines = [line for line in console.splitlines() if "[LoRA Guard]" in line]
    print("\n".join(lines))
    print(json.dumps(seen, indent=1))
    assert seen["with"] != seen["without"]
    assert seen["with"] == seen["with, after Reload UI"] == seen["with again"]
    assert seen["without"] == seen["without, after Reload UI"]
    assert sum("in place of Forge's LoRA patcher" in line for line in lines) == 1
    print("Reload UI: all as it should be")


if __name__ == "__main__":
    main()
