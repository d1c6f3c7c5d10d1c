"""The advice of `lora-guard plan`."""

from __future__ import annotations

# English, Simplified Chinese.
TEXTS: dict[str, tuple[str, str]] = {
    # What Forge cannot do with a model's storage.
    "advice.unreadable": ("Forge cannot read {formats}", "Forge 无法读取 {formats}"),
    "advice.unwritable": (
        "Forge cannot merge into {formats}: it stops with an error",
        "Forge 无法合并到 {formats}：会报错停止",
    ),
    "advice.other_quantisation": (
        "{problem}, and the guard works inside it: use the model in another quantisation.",
        "{problem}，而 LoRA Guard 在 Forge 中运行：请使用其他量化格式的模型。",
    ),
    "advice.not_merged": (
        "{problem}. Use LoRA Guard or 'Automatic (fp16 LoRA)'.",
        "{problem}。请使用 LoRA Guard 或“Automatic (fp16 LoRA)”。",
    ),
    # The guard.
    "advice.peak": (
        "{vram:.1f} GB of VRAM and {ram:.1f} GB of RAM at the peak, applied in {seconds:.1f} s",
        "显存峰值 {vram:.1f} GB、内存峰值 {ram:.1f} GB，应用用时 {seconds:.1f} 秒",
    ),
    "advice.peak_alone": (
        "{vram:.1f} GB of VRAM and {ram:.1f} GB of RAM at the peak",
        "显存峰值 {vram:.1f} GB、内存峰值 {ram:.1f} GB",
    ),
    "advice.fits": ("LoRA Guard fits: {peak}.", "使用 LoRA Guard 放得下：{peak}。"),
    "advice.needs": (
        "LoRA Guard needs {peak}, without {missing}: not in this file and not counted. Add the size of their files to the RAM, and "
        "compare with what is there.",
        "LoRA Guard 需要：{peak}，不含{missing}：它们不在此文件中，也未计入。请把它们的文件大小加到内存上，再与实际大小比较。",
    ),
    "advice.swapped": (
        "{gb:.1f} GB of the model are swapped and copied in every step: {smaller} would be faster.",
        "模型有 {gb:.1f} GB 换出到内存，每一步都要复制：改用 {smaller} 会更快。",
    ),
    "advice.smaller_wide": ("fp8, NF4 or GGUF", "fp8、NF4 或 GGUF"),
    "advice.smaller": ("NF4 or GGUF Q4", "NF4 或 GGUF Q4"),
    # Memory of any way.
    "advice.lower": (
        "{way}: lower GPU Weights by {mb} MB, or the peak will not fit into VRAM.",
        "{way}：请把“GPU Weights”调低 {mb} MB，否则显存峰值放不下。",
    ),
    "advice.smaller_picture": (
        "{way}: VRAM too small even without weights on the GPU: draw a smaller picture.",
        "{way}：即使显卡上不放任何权重，显存也不够：请缩小图片。",
    ),
    "advice.ram": (
        "{way}: RAM too small: it would need {needed:.1f} GB and {system:.1f} GB for the system; use a smaller model file, or expect the page "
        "file to be used.",
        "{way}：内存不足：需要 {needed:.1f} GB，另加系统的 {system:.1f} GB；请使用更小的模型文件，否则会用到页面文件（虚拟内存）。",
    ),
    # Forge's own ways.
    "advice.rounded": (
        "This LoRA has little or no effect when merged into {formats} (Forge's 'Automatic'), which rounds it away: use LoRA Guard or "
        "'Automatic (fp16 LoRA)'.",
        "合并到 {formats}（Forge 的“Automatic”）时，LoRA 会因舍入而几乎没有效果：请使用 LoRA Guard 或“Automatic (fp16 LoRA)”。",
    ),
    "advice.backup": (
        "RAM too small for Forge's backup ({backup:.1f} GB): 'Automatic' would need {needed:.1f} GB and {system:.1f} GB for the system. Without "
        "them it takes minutes in the page file, or the process dies.",
        "内存不足以容纳 Forge 的权重副本（{backup:.1f} GB）：“Automatic”需要 {needed:.1f} GB，另加系统的 {system:.1f} GB。"
        "内存不够时会用到页面文件（虚拟内存），耗时数分钟，或进程直接终止。",
    ),
    "advice.always_merged": (
        "Forge merges into 16-bit models whatever is chosen, and keeps the backup of {backup:.1f} GB in RAM while the model is on the GPU.",
        "对 16 位模型，无论选择什么，Forge 都会合并；模型在显卡上时，内存中会保留 {backup:.1f} GB 的权重副本。",
    ),
    "advice.slower": (
        "{way} costs about {times:.0f} times as much extra time per step as the guard.",
        "{way} 每步增加的时间约为 LoRA Guard 的 {times:.0f} 倍。",
    ),
    # What the numbers do not show.
    "advice.cannot_be_used": ("{name} cannot be used: {why}.", "{name} 无法使用：{why}。"),
    "advice.unknown_to_forge": (
        "Forge's own reader does not know {kinds} ({name}); the guard does.",
        "Forge 自带的读取方式不认识 {kinds}（{name}）；LoRA Guard 可以。",
    ),
    "advice.lost": ("{name}: {count} keys are lost on this model.", "{name}：有 {count} 个键无法应用到此模型。"),
    "advice.unmatched": (
        "{name}: {count} keys have no place in this file. Forge leaves out a LoRA with more than {most} such keys; keys of a text encoder "
        "that lies in another file do not count.",
        "{name}：有 {count} 个键在此文件中没有对应位置。这样的键超过 {most} 个时，Forge 会略过整个 LoRA；位于其他文件中的文本编码器的键不计算在内。",
    ),
    "advice.scaled_fp8": (
        "The model is scaled fp8: Forge's merge forgets its scales, the guard and 'fp16 LoRA' do not.",
        "模型为带缩放的 fp8：Forge 合并时会忽略缩放系数，LoRA Guard 与“fp16 LoRA”不会。",
    ),
    "advice.unknown_architecture": (
        "The architecture is not known: tokens are counted as for Flux, the numbers are rough.",
        "未知架构：token 数按 Flux 计算，数字只是粗略估计。",
    ),
    # Why a LoRA fits nothing.
    "advice.no_text_encoder": (
        "it changes text encoders alone and this file has none; give a checkpoint that has them",
        "它只修改文本编码器，而此文件中没有；请指定包含文本编码器的模型文件",
    ),
    "advice.nothing_fits": (
        "none of its {count} modules can be applied (first: {first}); use a LoRA made for this model",
        "其 {count} 个模块都无法应用（第一个：{first}）；请使用适用于此模型的 LoRA",
    ),
}
