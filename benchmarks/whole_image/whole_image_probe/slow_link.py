"""Makes copies between RAM and the card as slow as a laptop's link: a wait after each of them.

A copy that the program waits for is followed by a sleep for the rest of the time that it would have taken. A copy that goes
on in the background of a stream is followed by a wait of the card in that stream, so the program goes on, and only what
comes behind the copy waits. Copies in two streams at once do not share the link here; on a real one they would.
"""

import functools
import time

SMALLEST_BYTES = 1 << 16
"""Below that a copy's latency is larger than what the link adds."""
LEAST_SLEEP_SECONDS = 1e-3
"""Shorter waits are added up: the system's sleep is not finer."""
WRAPPED = ("to", "copy_", "cuda", "cpu")


class SlowLink:
    """Waits of one process."""

    def __init__(self, torch, rate_bytes_s):
        self.torch, self.rate = torch, rate_bytes_s
        self.owed, self.copies, self.waited = 0.0, 0, 0.0
        self.fast_rate = self.cycles_per_second = None

    def measure(self):
        """Measures the real link from pinned memory, and how long the card's waits are."""
        torch = self.torch
        size, cycles = 256 << 20, 50_000_000
        source = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        target = torch.empty(size, dtype=torch.uint8, device="cuda")
        self.plain_copy(target, source)
        for _ in range(5):  # the card's clock rises under load
            torch.cuda._sleep(cycles)
        events = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
        events[0].record()
        torch.cuda._sleep(cycles)
        events[1].record()
        self.plain_copy(target, source, non_blocking=True)
        events[2].record()
        torch.cuda.synchronize()
        self.cycles_per_second = cycles / (events[0].elapsed_time(events[1]) / 1000)
        self.fast_rate = size / (events[1].elapsed_time(events[2]) / 1000)
        print(f"whole image: copies slowed from {self.fast_rate / 1e9:.1f} to {self.rate / 1e9:.1f} GB/s", flush=True)

    def after(self, size, began, in_background):
        """Waits for the rest of a copy of `size` bytes that began at `began` (perf_counter)."""
        if self.fast_rate is None:
            self.measure()
        if in_background:
            seconds = size / self.rate - size / self.fast_rate
            if seconds > 0:
                self.waited += seconds
                self.torch.cuda._sleep(int(seconds * self.cycles_per_second))
            return
        self.owed = max(0.0, self.owed + size / self.rate - (time.perf_counter() - began))
        if self.owed > LEAST_SLEEP_SECONDS:
            self.waited += self.owed
            time.sleep(self.owed)
            self.owed = 0.0

    def wrap(self, name):
        """Returns the method of `Tensor` with a wait after each copy between RAM and the card."""
        original = getattr(self.torch.Tensor, name)

        @functools.wraps(original)
        def slowed(tensor, *arguments, **named):
            began, copies = time.perf_counter(), self.copies
            result = original(tensor, *arguments, **named)
            other = arguments[0] if name == "copy_" else tensor
            crossed = getattr(result, "is_cuda", False) != getattr(other, "is_cuda", False)
            if not crossed or result is other:
                return result
            size = result.numel() * result.element_size()
            # A quantised tensor copies its parts with these methods too: each byte waits once.
            if size < SMALLEST_BYTES or self.copies != copies:
                return result
            self.copies += 1
            in_ram = other if result.is_cuda else result
            free = bool(named.get("non_blocking")) or any(value is True for value in arguments)
            self.after(size, began, free and in_ram.is_pinned())
            return result

        return slowed


def install(torch, rate_bytes_s):
    """Slows the copies of this process down."""
    link = SlowLink(torch, rate_bytes_s)
    link.plain_copy = torch.Tensor.copy_
    for name in WRAPPED:
        setattr(torch.Tensor, name, link.wrap(name))
    return link
