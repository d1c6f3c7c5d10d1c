import sys
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parent.parent.parent / "benchmarks"
for folder in (BENCHMARKS, BENCHMARKS / "whole_image"):
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
