"""What stands under an image and beside it on a running Forge Neo: what tests/real_forge/picture.py does, in Neo's pages.

    FORGE_ROOT=... FORGE_PYTHON=... python tests/real_neo/picture.py

The Python that runs it needs playwright; FORGE_PYTHON is Neo's.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from real_forge import picture

from real_neo.neo import NEO_SETTINGS, Neo, link_extensions, unlink_extensions

if __name__ == "__main__":
    try:
        picture.main(Neo, link_extensions, NEO_SETTINGS)
    finally:
        unlink_extensions()
