"""The processor's time of the server for one request of the tab, which asks once a second while it is visible.

    python benchmarks/panel_poll.py

The stand-alone page of tests/ serves it on the loopback, after an image of 20 steps with two LoRAs: FastAPI and uvicorn with a made-up
card, the real RAM and no NVML. Counted is the whole process's processor time but for the thread that asks.
"""

import argparse
import json
import platform
import sys
import time
import urllib.parse
from http.client import HTTPConnection
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import fastapi  # noqa: E402
import uvicorn  # noqa: E402
from support.face_server import Served  # noqa: E402
from support.standalone import Standalone  # noqa: E402

from lib_lora_guard.ui.route import PATH  # noqa: E402
from lib_lora_guard.version import __version__  # noqa: E402

POLLS_A_MINUTE = 60
"""The tab waits a second after each answer (`EVERY_MS` in javascript/lora_guard.js)."""


class Cost(NamedTuple):
    """Processor time of the server in ms: of the first answer, which brings texts and log, and of one after it."""

    first_ms: float
    poll_ms: float
    bytes: int
    """Of one answer after the first."""

    @property
    def percent(self) -> float:
        """Share of one core's time that an open tab takes, during an image as at any other time."""
        return self.poll_ms * POLLS_A_MINUTE / 60_000 * 100


def measure(polls: int) -> Cost:
    """Asks as the tab does after its first answer, and returns the cost."""
    host = Standalone()
    host.step_seconds = 0
    host.generate()
    with Served(host.app) as server:
        connection = HTTPConnection("127.0.0.1", server.port, timeout=10)
        _spent_ms(connection, {}, 1)  # starts the server's threads
        first_ms, first, _ = _spent_ms(connection, {}, 1)
        known = {"since": first["lines"][-1]["number"], "boot": first["boot"], "language": first["language"]}
        known["sample"] = first["curve"]["samples"][-1][0]
        poll_ms, told, size = _spent_ms(connection, known, polls)
        assert (told["known"], told["lines"]) == (True, [])
        connection.close()
    assert host.asked == polls + 2
    return Cost(first_ms, poll_ms, size)


def _spent_ms(connection: HTTPConnection, query: dict[str, object], polls: int) -> tuple[float, dict, int]:
    started = time.process_time() - time.thread_time()
    for _ in range(polls):
        connection.request("GET", f"{PATH}?{urllib.parse.urlencode(query)}")
        body = connection.getresponse().read()
    spent = time.process_time() - time.thread_time() - started
    return spent * 1000 / polls, json.loads(body), len(body)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--polls", type=int, default=600)
    given = parser.parse_args()
    cost = measure(given.polls)
    print(
        f"LoRA Guard {__version__}, Python {platform.python_version()}, FastAPI {fastapi.__version__}, uvicorn {uvicorn.__version__}: "
        f"first answer {cost.first_ms:.1f} ms, one of {given.polls} after it {cost.poll_ms:.2f} ms ({cost.bytes} bytes); "
        f"{POLLS_A_MINUTE} a minute are {cost.percent:.2f} % of a core"
    )


if __name__ == "__main__":
    main()
