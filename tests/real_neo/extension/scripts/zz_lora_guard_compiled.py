"""Test-only: how much of a model torch.compile has taken in this process, under `/lora-guard-test/compiled`.

With LORA_GUARD_FAST_FP8=1 the CPU counts as a device with fp8 products, so that Neo makes the layers of `--fast-fp8`.
"""

import os

import torch
from backend import memory_management as memory
from modules import script_callbacks


def add_address(_, app):
    @app.get("/lora-guard-test/compiled")
    def compiled():
        counted = torch._dynamo.utils.counters
        return {
            "graphs": counted["stats"]["unique_graphs"],
            "breaks": sum(counted["graph_break"].values()),
            "calls": counted["stats"]["calls_captured"],
        }


if os.environ.get("LORA_GUARD_FAST_FP8"):
    memory.supports_fp8_compute = lambda device=None: True
script_callbacks.on_app_started(add_address)
