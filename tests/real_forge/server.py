"""A Forge process and its API. Loopback only."""

import base64
import io
import json
import os
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent.parent
FORGE = Path(os.environ["FORGE_ROOT"])
PYTHON = os.environ["FORGE_PYTHON"]
PORT = int(os.environ.get("LORA_GUARD_TEST_PORT", "7871"))


class ApiError(Exception):
    pass


class Server:
    """`with Server(log, flags, env) as forge: forge.image(prompt="...")`."""

    on_the_cpu = "--always-cpu"

    def __init__(self, log, flags=(), env=None, web=False):
        self.log = Path(log)
        self.flags = list(flags) if web else ["--nowebui", *flags]
        self.env = {**os.environ, **(env or {})}
        self.url = f"http://127.0.0.1:{PORT}"

    def __enter__(self):
        command = [PYTHON, "launch.py", "--skip-prepare-environment", "--skip-install", "--skip-torch-cuda-test"]
        command += [
            "--skip-python-version-check",
            self.on_the_cpu,
            "--api",
            "--server-name",
            "127.0.0.1",
            "--port",
            str(PORT),
            *self.flags,
        ]
        quiet = {
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_OFFLINE": "1",
            "GRADIO_ANALYTICS_ENABLED": "False",
            "PYTHONUNBUFFERED": "1",
            "SD_WEBUI_RESTARTING": "1",
        }
        self.process = subprocess.Popen(
            command, cwd=FORGE, env={**self.env, **quiet}, stdout=self.log.open("wb"), stderr=subprocess.STDOUT
        )
        for _ in range(600):
            time.sleep(1)
            if self.process.poll() is not None:
                raise RuntimeError(f"Forge ended at start:\n{self.log.read_text(errors='replace')[-3000:]}")
            try:
                self.call("/sdapi/v1/sd-models")
            except (OSError, ApiError):
                continue
            return self
        raise TimeoutError("Forge did not start in 10 minutes")

    def __exit__(self, *_):
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def call(self, path, data=None):
        body = None if data is None else json.dumps(data).encode()
        request = urllib.request.Request(self.url + path, body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=600) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise ApiError(f"HTTP {error.code}: {error.read().decode(errors='replace')[:500]}") from None

    def checkpoint(self, name):
        return next(m["title"] for m in self.call("/sdapi/v1/sd-models") if name in m["title"])

    def image(self, model=None, endpoint="txt2img", modules=None, **settings):
        """The images of one call as one uint8 array `(n, h, w, 3)`."""
        body = {
            "prompt": "a cat",
            "negative_prompt": "",
            "steps": 3,
            "width": 64,
            "height": 64,
            "cfg_scale": 7,
            "seed": 1,
        }
        body |= {"sampler_name": "Euler", "scheduler": "Simple", "save_images": False, **settings}
        if model is not None:
            override = {"sd_model_checkpoint": self.checkpoint(model), "forge_additional_modules": modules or []}
            body |= {
                "override_settings": {**override, **settings.get("override_settings", {})},
                "override_settings_restore_afterwards": False,
            }
        answer = self.call(f"/sdapi/v1/{endpoint}", body)
        return np.stack(
            [np.asarray(Image.open(io.BytesIO(base64.b64decode(image))).convert("RGB")) for image in answer["images"]]
        )

    def console(self):
        return self.log.read_text(encoding="utf-8", errors="replace")


def png_base64(array):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()
