"""LoRA Guard: a memory-aware LoRA patcher for Stable Diffusion WebUI Forge and for any `torch.nn.Module`."""

from .version import __version__

__all__ = ["LoraGuard", "__version__", "load_stored"]


def __dir__() -> list[str]:
    # What `__getattr__` makes is in no module dictionary.
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> object:
    # Lazy: Forge imports this package before it has decided whether the guard is wanted.
    if name in ("LoraGuard", "load_stored"):
        from .hosts import plain

        return getattr(plain, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
