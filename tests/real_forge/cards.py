"""The line on the LoRA cards of a running Forge: base model, rank and fit; gone where it is switched off; what the page costs.

    FORGE_ROOT=... FORGE_PYTHON=... LORA_GUARD_TEST_PORT=7915 $FORGE_PYTHON tests/real_forge/cards.py

docs/hosts.md says what FORGE_ROOT needs; `tests/real_neo/cards.py` is the same for Forge Neo.
"""

import html
import re
import sys
import tempfile
import time
import urllib.parse
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from real_forge.run import link_extensions
from real_forge.server import FORGE, ApiError, Server

LORAS = {"lg_sd15_a": "SD 1.x, LoRA of rank", "lg_flux_a": "Flux, LoRA of rank"}
"""Names of files in models/Lora, and what their cards say first."""
CHECKPOINT = "rand_sd15_tiny"


def card(forge, name):
    """`(description, milliseconds)` of one card, made by the host."""
    query = urllib.parse.urlencode({"page": "lora", "tabname": "txt2img", "name": name})
    started = time.perf_counter()
    made = forge.call(f"/sd_extra_networks/get-single-card?{query}")["html"]
    took = 1000 * (time.perf_counter() - started)
    return html.unescape(re.search(r'<span class="description">(.*?)</span>', made, re.DOTALL)[1]).strip(), took


def is_up(forge):
    """The API answers before the page's addresses are there."""
    try:
        card(forge, next(iter(LORAS)))
    except ApiError:
        return False
    return True


def check(condition, words):
    print(("ok    " if condition else "WRONG ") + words, flush=True)
    return condition


def look(forge, loras=None):
    loras = loras or LORAS
    good = True
    forge.call("/sdapi/v1/options", {"lora_guard_language": "en", "sd_model_checkpoint": CHECKPOINT})
    deadline = time.monotonic() + 120
    while not is_up(forge) and time.monotonic() < deadline:
        time.sleep(1)
    while any(CHECKPOINT not in card(forge, name)[0] for name in loras) and time.monotonic() < deadline:
        time.sleep(1)
    for name, begin in loras.items():
        description, took = card(forge, name)
        good &= check(description.startswith(begin), f"{name}: {description!r} ({took:.0f} ms)")
    said = [card(forge, name)[0] for name in loras]
    fits = [" fits " in line and "does not fit" not in line for line in said]
    good &= check(any(fits) and not all(fits), f"one fits the chosen checkpoint, another does not: {fits}")
    names = [path.stem for path in sorted((FORGE / "models" / "Lora").glob("*.safetensors"))]

    def cost():
        return sum(card(forge, name)[1] for name in names) / len(names)

    cost()
    while any(not card(forge, name)[0] for name in names) and time.monotonic() < deadline:
        time.sleep(5)
    taken = {True: [], False: []}
    for switch in (True, False) * 3:
        forge.call("/sdapi/v1/options", {"lora_guard_lora_cards": switch})
        taken[switch].append(cost())
    # The least of three: other programs only add.
    print(
        f"a card takes {min(taken[True]):.1f} ms with the line and {min(taken[False]):.1f} ms without ({len(names)} cards)"
    )
    good &= check(
        not any(line in card(forge, name)[0] for name, line in loras.items()), "switched off there is no line"
    )
    forge.call("/sdapi/v1/options", {"lora_guard_lora_cards": True})
    return good


def main(server=Server, link=link_extensions, loras=None):
    link()
    log = Path(tempfile.mkdtemp(prefix="lora-guard-cards-")) / "forge.log"
    with server(log, web=True) as forge:
        good = look(forge, loras)
    good &= check("lib_lora_guard" not in log.read_text(errors="replace"), f"no traceback of the guard's in {log}")
    print("LoRA cards:", "all as it should be" if good else "WRONG")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
