"""The modes of a weight, and the reasons for each choice."""

from __future__ import annotations

# English, Simplified Chinese.
TEXTS: dict[str, tuple[str, str]] = {
    "mode.bypass": ("bypass", "旁路"),
    "mode.on_the_fly": ("on_the_fly", "即时计算"),
    "mode.merge": ("merge", "合并"),
    # Reasons for a choice.
    "reason.small": ("small parameter", "小参数"),
    "reason.no_call": ("no layer call reaches it", "没有层调用会用到它"),
    "reason.asked": ("asked for", "按设置"),
    "reason.large": ("as large as the weight", "与权重一样大"),
    "reason.low_rank": ("low rank", "低秩"),
    "reason.cheap": ("cheap through the layer's call", "经层调用开销小"),
    "reason.cheaper_on_weight": ("cheaper on the weight", "作用于权重开销更小"),
    "reason.needs_weight": ("kind needs the weight", "此类型需要权重"),
    "reason.no_weight": ("weight not reachable", "无法访问权重"),
    "reason.direct": ("layer computes with its weight directly", "该层直接使用其权重计算"),
    # Reasons why none is possible.
    "reason.outside_layers": (
        "stored as {format} and read outside any layer, so a LoRA cannot be added to it",
        "以 {format} 存储，且在层之外读取，因此无法叠加 LoRA",
    ),
    "reason.rounds_away": (
        "stored as {format}; merging would round most of the LoRA away. Use mode 'auto'",
        "以 {format} 存储；合并会因舍入丢失 LoRA 的大部分效果。请使用 auto 模式",
    ),
    "reason.hidden_weight": (
        "stored as {format} in a layer that gives no access to the weight it computes with",
        "以 {format} 存储，且所在的层不提供对其计算所用权重的访问",
    ),
}
