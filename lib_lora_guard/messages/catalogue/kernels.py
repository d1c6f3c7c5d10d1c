"""The kernels that make a layer's temporary weight in one pass."""

from __future__ import annotations

# English, Simplified Chinese.
TEXTS: dict[str, tuple[str, str]] = {
    "kernels.refused": (
        "The fused kernel for {kind} is not used ({why}); these layers keep the ordinary way, which is right and takes longer. "
        "Set {switch}=0 to try no kernels.",
        "未使用 {kind} 的融合内核（{why}）；这些层仍用普通方式计算，结果正确，只是较慢。设置 {switch}=0 可停用全部内核。",
    ),
    "kernels.other_kernel": (
        "The newer of two kernels for {kind} is not used ({why}); the older one takes its place. Without {switch} it is not tried.",
        "{kind} 有新旧两种内核，新内核未启用（{why}），改用旧内核。去掉 {switch} 即不再尝试新内核。",
    ),
    "kernels.ready": (
        "fused kernels compiled and checked: {count}, in {seconds:.0f} s; new stacks of LoRAs take them.",
        "已用 {seconds:.0f} 秒编译并检查 {count} 个融合内核；新选用的 LoRA 将使用它们。",
    ),
    "kernels.no_triton": (
        "Triton is not installed ({error}), so layers with LoRAs keep the ordinary way, which takes longer.",
        "未安装 Triton（{error}），因此带 LoRA 的层仍用较慢的普通方式计算。",
    ),
    "kernels.old_triton": (
        "Triton {found} is older than {oldest}, which the fused kernels need, so layers with LoRAs keep the ordinary way, which takes "
        "longer: see docs/kernels.md for the version that fits your torch.",
        "Triton {found} 过旧，融合内核需要 {oldest} 或更新的版本，因此带 LoRA 的层仍用较慢的普通方式计算：与您的 torch 匹配的版本见 docs/kernels.md。",
    ),
    "kernels.install": (
        "LoRAs on fp8, NF4 and GGUF models would cost less time a step with Triton, which Windows lacks ({error}): see docs/kernels.md "
        "for the version that fits your torch.",
        "安装 Triton 后，fp8、NF4 和 GGUF 模型上的 LoRA 每步耗时更少，而 Windows 默认没有 Triton（{error}）：与您的 torch 匹配的版本见 docs/kernels.md。",
    ),
    "kernels.no_kernel": ("there is none for this storage", "此存储格式没有内核"),
    "kernels.newer_triton": (
        "it needs Triton {oldest}, and {found} is installed",
        "它需要 Triton {oldest}，而已安装的是 {found}",
    ),
    "kernels.only_nvidia": ("kernels are for NVIDIA's cards", "内核仅适用于 NVIDIA 显卡"),
    "kernels.old_card": (
        "this card has compute capability {found}, and Triton needs {oldest}",
        "此显卡的计算能力为 {found}，而 Triton 需要 {oldest}",
    ),
    "kernels.no_bf16": ("this card has no bf16", "此显卡不支持 bf16"),
}
