"""The line on the LoRA cards of a running Forge Neo: what tests/real_forge/cards.py looks at.

FORGE_ROOT=... FORGE_PYTHON=... python tests/real_neo/cards.py
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from real_forge import cards

from real_neo.neo import Neo, link_extensions, unlink_extensions

if __name__ == "__main__":
    try:
        sys.exit(cards.main(Neo, link_extensions))
    finally:
        unlink_extensions()
