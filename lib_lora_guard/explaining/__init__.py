"""What a pasted console log of a host shows about LoRAs and memory, and what to change. Pure.

`reading` makes lines of bytes, `host_lines` knows what hosts print, `rules` draws the conclusions.
"""

from .explain import Explanation as Explanation
from .explain import explain as explain
