"""Changes of a model that meet another change, another guard, or values of the user's own."""

from __future__ import annotations

# English, Simplified Chinese.
TEXTS: dict[str, tuple[str, str]] = {
    "change.busy": (
        "the LoRAs of this model are being changed in this very thread, and code that runs meanwhile (a signal handler, a "
        "finaliser) asked for another change; ask again when apply() or remove() has returned",
        "此线程正在更改该模型的 LoRA，而其间运行的代码（信号处理程序、终结器）又请求了一次更改；请在 apply() 或 remove() 返回后再试",
    ),
    "change.shared": (
        "a LoRA of another guard ({other}) is on this weight of {model}, and on {count} in all; take it off with that guard's "
        "remove() first, or apply both LoRAs with one guard",
        "{model} 的这个权重上已有另一个 guard（{other}）的 LoRA，共涉及 {count} 个权重；请先用那个 guard 的 remove() 取下，或用同一个 guard 应用两个 LoRA",
    ),
    "change.replaced": (
        "{model}: {count} parameters were replaced or loaded while a LoRA was merged into them (the first is {key}); the new "
        "values stay and count as values without a LoRA; next time take LoRAs off (guard.remove()) before loading",
        "{model}：有 {count} 个参数在合并了 LoRA 期间被替换或重新加载（第一个是 {key}）；保留新值并视为不含 LoRA 的值；下次请在加载前先取下 LoRA（guard.remove()）",
    ),
    "change.converted": (
        "{model}: {count} parameters were converted to {dtype} while a LoRA was merged into them (the first is {key}); their "
        "originals were converted too; next time take LoRAs off (guard.remove()) before converting",
        "{model}：有 {count} 个参数在合并了 LoRA 期间被转换为 {dtype}（第一个是 {key}）；其原始值也已一并转换；下次请在转换前先取下 LoRA（guard.remove()）",
    ),
}
