"""A second process that holds a chosen amount of VRAM, as other programs do."""

import gc
import subprocess
import sys

MB = 1 << 20

BALLAST = """
import sys, torch
PIECE = 32 << 30
torch.cuda.mem_get_info()
whole, rest = [], None
print("ready", flush=True)
for line in sys.stdin:
    wanted, rest = int(line), None
    # The large pieces stay where they are: a hundred gigabytes are half a second each time.
    del whole[wanted // PIECE:]
    torch.cuda.empty_cache()
    try:
        while len(whole) < wanted // PIECE:
            whole.append(torch.empty(PIECE, dtype=torch.uint8, device="cuda"))
    except torch.cuda.OutOfMemoryError:
        pass
    left = wanted - len(whole) * PIECE
    # What the driver calls free cannot always be had to the last megabyte.
    for size in range(left, max(0, left - (256 << 20)), -(2 << 20)):
        try:
            rest = torch.empty(size, dtype=torch.uint8, device="cuda")
            break
        except torch.cuda.OutOfMemoryError:
            pass
    print("held", len(whole) * PIECE + (0 if rest is None else rest.numel()), flush=True)
"""


class Ballast:
    """Controls the second process. Without CUDA it holds nothing and reports the wanted bytes as free."""

    SLACK_BYTES = 4 * MB
    """The driver allocates in pieces of 2 MB."""

    def __init__(self, torch):
        self.torch, self.held_bytes, self.process = torch, 0, None
        if torch.cuda.is_available():
            torch.cuda.mem_get_info()  # this process's own context first
            command = [sys.executable, "-c", BALLAST]
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            self._expect("ready")

    def leave(self, wanted_bytes):
        """Leaves `wanted_bytes` of VRAM to this process beside what it holds; returns the free bytes."""
        self.release_cache()
        if self.process is None:
            return int(wanted_bytes)
        for _ in range(4):
            free = self.free_bytes()
            if abs(free - wanted_bytes) <= self.SLACK_BYTES:
                break
            self._hold(max(0, self.held_bytes + free - int(wanted_bytes)))
        return self.free_bytes()

    def free_bytes(self):
        return self.torch.cuda.mem_get_info()[0] if self.process is not None else 0

    def release_cache(self):
        gc.collect()
        if self.torch.cuda.is_available():
            self.torch.cuda.synchronize()
            self.torch.cuda.empty_cache()

    def close(self):
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def _hold(self, size):
        # Changed pieces are freed before new ones are allocated: large pieces first, and the rest in one.
        self.process.stdin.write(f"{size}\n")
        self.process.stdin.flush()
        self.held_bytes = int(self._expect("held"))

    def _expect(self, word):
        line = self.process.stdout.readline().split() or ["nothing"]
        assert line[0] == word, f"the ballast process says {line[0]!r} where {word!r} was expected"
        return line[-1]

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()
