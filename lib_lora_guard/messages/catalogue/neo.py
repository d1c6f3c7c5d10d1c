"""Applying LoRAs in Forge Neo."""

from __future__ import annotations

# English, Simplified Chinese.
TEXTS: dict[str, tuple[str, str]] = {
    "neo.in_place": ("{version} in place of Forge Neo's LoRA patcher", "{version} 已接管 Forge Neo 的 LoRA 补丁功能"),
    "neo.nunchaku": (
        "this is a nunchaku model, whose LoRAs nunchaku's own code applies; LoRA Guard leaves them alone",
        "这是 nunchaku 模型，其 LoRA 由 nunchaku 自身的代码应用；LoRA Guard 不作处理",
    ),
    "neo.add_patches_failed": (
        "{name}: the function that another extension has put in place of add_patches failed; the LoRA is applied whole at strength {strength}, without what that extension does to it. The traceback names the extension: update it or switch it off",
        "{name}：其他扩展用来替换 add_patches 的函数出错；该 LoRA 以强度 {strength} 完整应用，不含该扩展的处理。回溯信息指明了该扩展：请更新或停用它",
    ),
    "neo.products_off": (
        "{model}: {count} of {of} patched {formats} weights run without the fast product of their format while these LoRAs are on: LoRAs of low rank keep it, other kinds need the weight decoded",
        "{model}：应用这些 LoRA 期间，{of} 个应用了 LoRA 的 {formats} 权重中有 {count} 个不使用该格式的快速乘法：低秩 LoRA 会保留它，其他类型需要解码权重",
    ),
    "neo.on_the_fly": ("Forge's (fp16 LoRA) way", " Forge 的 (fp16 LoRA) 方式"),
    "neo.both_ways": (
        "Forge's (fp16 LoRA) way, and its merge on 16-bit weights",
        " Forge 的 (fp16 LoRA) 方式，16 位权重则用合并方式",
    ),
}
