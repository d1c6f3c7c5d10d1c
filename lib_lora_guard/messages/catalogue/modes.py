"""The modes of a weight, and the reasons for each choice."""

from __future__ import annotations

# English, Simplified Chinese.
TEXTS: dict[str, tuple[str, str]] = {
    "mode.bypass": ("bypass", "旁路"),
    "mode.fused": ("{mode}, fused", "{mode}（融合）"),
    "mode.partly_fused": ("{mode}, {fused} of them fused", "{mode}（其中 {fused} 个融合）"),
    "mode.kernel_failed": (
        "the fast kernel for {kind} failed ({error}); such layers run without it until the WebUI starts again. If images are not as they "
        'should be, switch "Fast kernels" off on the settings page and report this line',
        "{kind} 的快速内核出错（{error}）；在 WebUI 重新启动前，这类层将不使用该内核。若图片异常，请在设置页关闭“快速内核”并反馈本行",
    ),
    "mode.kernel_late": (
        "the fast kernel for {kind}, rank {rank}, was not compiled within {seconds:.0f} s; images with these LoRAs are made without it, so that "
        "the same prompt gives the same picture. Choose other LoRAs, or start the WebUI again, and it is used",
        "{kind}（秩 {rank}）的快速内核未能在 {seconds:.0f} 秒内编译完成；为使相同提示词得到相同图片，使用这些 LoRA 的图片将不使用该内核。"
        "换用其他 LoRA 或重新启动 WebUI 后即会使用",
    ),
    "mode.on_the_fly": ("on_the_fly", "即时计算"),
    "mode.merge": ("merge", "合并"),
    "mode.compiled": (
        'torch.compile of torch {version} fails on layers with LoRAs; use mode="merge", or torch 2.4 or newer',
        'torch {version} 的 torch.compile 无法处理带 LoRA 的层；请使用 mode="merge"，或升级到 torch 2.4 及以上版本',
    ),
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
    # Reasons for a choice, and why another is not possible: the layer's own code.
    "reason.own_code": (
        "{class_name} computes with its weight in a way of its own",
        "{class_name} 以自己的方式使用其权重进行计算",
    ),
    "reason.own_forward": (
        "another program has replaced the forward of this {class_name}",
        "另一个程序替换了此 {class_name} 的 forward",
    ),
    "reason.computed": (
        "its weight is computed anew for each call (weight norm, parametrization); use a LoRA of another kind, or remove "
        "the parametrization first",
        "其权重在每次调用时重新计算（weight norm、parametrization）；请使用其他类型的 LoRA，或先移除 parametrization",
    ),
    "reason.elsewhere": (
        "its weight is not on the layer but kept elsewhere between calls (offloaded); load the model without offloading "
        "for this",
        "其权重不在该层上，而是在调用之间保存在别处（已卸载）；为此请在不卸载的情况下加载模型",
    ),
    # Reasons why none is possible.
    "reason.outside_layers": (
        "stored as {format} and read outside any layer, so a LoRA cannot be added to it",
        "以 {format} 存储，且在层之外读取，因此无法叠加 LoRA",
    ),
    "reason.rounds_away": (
        "stored as {format}; merging would round most of the LoRA away. Use mode 'auto'",
        "以 {format} 存储；合并会因舍入丢失 LoRA 的大部分效果。请使用“自动”模式",
    ),
    "reason.hidden_weight": (
        "stored as {format} in a layer that gives no access to the weight it computes with; use a LoRA of another kind "
        "(LoRA, LoHa, IA3), or the model in 16 bits",
        "以 {format} 存储，且所在的层不提供对其计算所用权重的访问；请使用其他类型的 LoRA（LoRA、LoHa、IA3），或使用 16 位模型",
    ),
}
