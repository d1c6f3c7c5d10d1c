"""A running Forge or Forge Neo, driven over its API. Loopback only."""

import base64
import io
import json
import os
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent


class Kind(NamedTuple):
    """What differs between the hosts when they are started.

    Attributes:
        models_flag: The argument that names the folder of models.
        cpu_flag: The argument to run without a GPU.
        config: Settings that must be there for the host to start.
    """

    models_flag: str
    cpu_flag: str
    config: dict


KINDS = {
    "forge": Kind("--models-dir", "--always-cpu", {}),
    "neo": Kind("--model-ref", "--cpu", {"VERSION_UID": "PY313"}),
}
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "GRADIO_ANALYTICS_ENABLED": "False",
    "SD_WEBUI_RESTARTING": "1",
    "PYTHONUNBUFFERED": "1",
    "PYTHONFAULTHANDLER": "1",
    # Else transformers imports every framework that a machine has.
    "USE_TORCH": "1",
    "USE_TF": "0",
    "USE_FLAX": "0",
    "USE_JAX": "0",
}


class HostError(Exception):
    """A call of the API that gave no answer, or a host that did not start."""


class Host:
    """A process, from its start to the end of the `with` block."""

    def __init__(self, kind, root, python, data, models, log, port, on_cpu=False, environment=None, flags=()):
        """Says how to start it.

        Args:
            kind: "forge" or "neo".
            root: The host's folder.
            python: The Python that has its packages.
            data: The folder made by `ways.data_folder`.
            models: The folder of models.
            log: The file for its console.
            port: A free one.
            on_cpu: Run it without a GPU.
            environment: More variables.
            flags: More arguments.
        """
        facts = KINDS[kind]
        self.command = [str(python), "launch.py", "--skip-prepare-environment", "--skip-install"]
        self.command += ["--skip-torch-cuda-test", "--skip-python-version-check", "--nowebui", "--api"]
        self.command += ["--server-name", "127.0.0.1", "--port", str(port), "--data-dir", str(data)]
        self.command += [facts.models_flag, str(models), *([facts.cpu_flag] if on_cpu else []), *flags]
        self.environment = {**os.environ, **QUIET, **(environment or {})}
        self.root, self.log, self.url = root, Path(log), f"http://127.0.0.1:{port}"
        self.process = None

    def __enter__(self):
        with self.log.open("wb") as console:
            self.process = subprocess.Popen(
                self.command, cwd=self.root, env=self.environment, stdout=console, stderr=subprocess.STDOUT
            )
        return self

    def wait(self, seconds):
        """Waits until the API answers.

        Raises:
            HostError: It did not within `seconds`, or the process ended.
        """
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise HostError(f"ended at its start with {self.process.returncode}: {self.last_words()}")
            try:
                return self.call("/sdapi/v1/sd-models", timeout=5)
            except HostError:
                time.sleep(0.5)
        raise HostError(f"no answer after {seconds:.0f} s: {self.last_words()}")

    def __exit__(self, *_):
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def call(self, path, data=None, timeout=400):
        """Returns the answer to one call.

        Raises:
            HostError: With the status and the beginning of the answer.
        """
        body = None if data is None else json.dumps(data).encode()
        request = urllib.request.Request(self.url + path, body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise HostError(f"HTTP {error.code}: {error.read().decode(errors='replace')[:300]}") from None
        except (OSError, ValueError) as error:
            raise HostError(f"{type(error).__name__}: {error}"[:300]) from None

    def choose(self, name):
        """Makes the checkpoint whose title has this name the current one."""
        titles = [model["title"] for model in self.call("/sdapi/v1/sd-models") if name in model["title"]]
        if not titles:
            raise HostError(f"{name}: the host lists no such checkpoint")
        self.call("/sdapi/v1/options", {"sd_model_checkpoint": titles[0]})

    def image(self, prompt, steps, size, timeout):
        """Returns one picture as uint8 `(height, width, 3)`, and the seconds that it took."""
        import numpy as np
        from PIL import Image

        body = {"prompt": prompt, "negative_prompt": "", "steps": steps, "width": size, "height": size, "seed": 7}
        body |= {"cfg_scale": 1, "distilled_cfg_scale": 3.5, "sampler_name": "Euler", "scheduler": "Simple"}
        began = time.perf_counter()
        answer = self.call("/sdapi/v1/txt2img", {**body, "save_images": False}, timeout)
        seconds = time.perf_counter() - began
        picture = Image.open(io.BytesIO(base64.b64decode(answer["images"][0]))).convert("RGB")
        return np.asarray(picture), seconds

    def last_words(self):
        return self.log.read_text(encoding="utf-8", errors="replace")[-600:] if self.log.exists() else ""
