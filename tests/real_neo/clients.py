"""A running Forge Neo under load: what tests/real_forge/clients.py does, in Neo.

FORGE_ROOT=... FORGE_PYTHON=... $FORGE_PYTHON tests/real_neo/clients.py [--only pictures,kills,memory] [--write-docs]
"""

import sys
from pathlib import Path
from typing import ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from real_forge import clients
from real_forge.run import measured_on

from real_neo.neo import HOST, NEO_SETTINGS, Neo, link_extensions, linked, write_docs


class OneModel(clients.OneModel, Neo):
    families: ClassVar = {"nf_bf16": ("nf", 1), "rand_sd15_tiny": ("sd15", 7)}
    settings = NEO_SETTINGS
    upscaler = "None"
    link = staticmethod(link_extensions)

    @staticmethod
    def write_docs(text):
        write_docs("clients", f"{measured_on(HOST)} {text}")


if __name__ == "__main__":
    with linked():
        sys.exit(clients.main(OneModel))
