"""Counts what torch allocates: every storage that an operation makes, and the bytes of those that live at a time.

What an operation takes and gives back inside its own kernel is not seen; a matrix library's workspace does not grow
with a LoRA.
"""

import weakref

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """`with LiveMemory() as memory:` - `peak_bytes` is the most that new storages held at a time, `sizes` has the bytes
    of every new storage in order. Storages that are there before are not counted; a result in one of them is not new."""

    def __init__(self, *known):
        super().__init__()
        self.live_bytes = self.peak_bytes = 0
        self.sizes = []
        self._seen = {}
        for tensor in known:
            self._note(tensor, is_new=False)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for leaf in tree_leaves((args, kwargs or {})):
            self._note(leaf, is_new=False)
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            self._note(leaf, is_new=True)
        return result

    def at_least(self, size_bytes):
        """Sizes of the new storages of `size_bytes` and more."""
        return [size for size in self.sizes if size >= size_bytes]

    def _note(self, tensor, is_new):
        if not isinstance(tensor, Tensor) or tensor.device.type == "meta":
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._seen:
            return
        size = storage.nbytes() if is_new else 0
        self._seen[key] = weakref.ref(storage, lambda _: self._gone(key, size))
        if is_new:
            self.sizes.append(size)
            self.live_bytes += size
            self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def _gone(self, key, size):
        self._seen.pop(key, None)
        self.live_bytes -= size
