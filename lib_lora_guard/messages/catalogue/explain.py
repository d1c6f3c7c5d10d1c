"""What `lora-guard explain` says of a pasted log: what happened, and what to change."""

from __future__ import annotations

# English, Simplified Chinese.
TEXTS: dict[str, tuple[str, str]] = {
    "explain.answer": (
        "What happened: {said}",
        "发生了什么：{said}",
    ),
    "explain.ours_alone": (
        "Nothing went wrong in the WebUI; LoRA Guard itself warns {count} times (below)",
        "WebUI 没有出错；LoRA Guard 自己给出 {count} 条警告（见下）",
    ),
    "explain.harmless": (
        "Nothing went wrong: {count} lines look alarming and are harmless (below)",
        "没有出错：有 {count} 处信息看起来吓人，其实无害（见下）",
    ),
    "explain.all_well": (
        "Nothing went wrong with a LoRA or with memory in these {lines} lines",
        "这 {lines} 行日志中，LoRA 与内存都没有出错",
    ),
    "explain.nothing": (
        "Nothing of a LoRA or of memory in it ({lines} lines read): paste the console's whole text, from the start of the program to "
        "the error",
        "其中没有与 LoRA 或内存有关的内容（已读 {lines} 行）：请粘贴控制台的全部文字，从程序启动到出错为止",
    ),
    "explain.host": ("Written by: {facts}", "日志来自：{facts}"),
    "explain.host_old": ("an older Forge (2024)", "较旧的 Forge（2024 年）"),
    "explain.host_memory": ("{vram:.0f} GB of VRAM and {ram:.0f} GB of RAM", "显存 {vram:.0f} GB、内存 {ram:.0f} GB"),
    "explain.do": ("To do: {do}", "怎么办：{do}"),
    "explain.ours": ("LoRA Guard says in it:", "其中 LoRA Guard 的信息："),
    "explain.harmless_heading": ("Alarming and harmless:", "看起来吓人，其实无害："),
    "explain.ram_known": ("{gb:.0f} GB of RAM", "本机内存 {gb:.0f} GB"),
    "explain.ram_unknown": ("how much RAM there is, the log does not say", "日志中没有内存大小"),
    "explain.asked": ("{mb:.0f} MB were asked for", "当时请求 {mb:.0f} MB"),
    "explain.asked_unknown": ("how much was asked for, the log does not say", "日志中没有请求的大小"),
    "explain.of_card": (", of {mb:.0f} MB on the card", "（显卡共 {mb:.0f} MB）"),
    "explain.of_unknown_card": (", less than there is", "（少于应有的显存）"),
    # Memory of the computer.
    "explain.ram_death": (
        "the program ended without an error while a model was loaded or patched ({ram}): so it ends where RAM and "
        "page file are full",
        "程序在加载模型或应用 LoRA 时没有报错就结束了（{ram}）：内存与页面文件用尽时就是这样",
    ),
    "explain.ram_death_do": (
        "let Windows manage the page file, or give it 30 to 40 GB on an SSD; close other programs; take a smaller text encoder (T5 in fp8) "
        "or model file. Forge's merge keeps a copy of every patched weight in RAM; LoRA Guard keeps none",
        "让 Windows 自动管理页面文件（虚拟内存），或在固态硬盘上设为 30 至 40 GB；关闭其他程序；换用更小的文本编码器（fp8 的 T5）或模型文件。"
        "Forge 合并 LoRA 时会在内存中为每个被修改的权重保留一份副本；LoRA Guard 不保留",
    ),
    "explain.cut_off": (
        "the log ends while a model was loaded, moved or patched ({ram}): if the PC froze or restarted there, or the window was gone, RAM and "
        "page file were full",
        "日志在加载、移动模型或应用 LoRA 时中断（{ram}）：如果电脑当时卡死、重启，或窗口消失，就是内存与页面文件用尽了",
    ),
    "explain.cut_off_do": (
        "let Windows manage the page file, or give it 30 to 40 GB on an SSD; close other programs; take a smaller text encoder (T5 in fp8) "
        "or model file. If it was still at work when you copied the log, copy it again later",
        "让 Windows 自动管理页面文件（虚拟内存），或在固态硬盘上设为 30 至 40 GB；关闭其他程序；换用更小的文本编码器（fp8 的 T5）或模型文件。"
        "如果复制日志时程序仍在工作，请稍后重新复制",
    ),
    "explain.page_file": (
        "Windows refused memory, because its page file is too small",
        "页面文件（虚拟内存）太小，Windows 拒绝分配内存",
    ),
    "explain.page_file_do": (
        "let Windows manage the page file's size on a drive with 40 GB free (System > Advanced system settings > Performance > Virtual "
        "memory), and restart",
        "在剩余空间不少于 40 GB 的磁盘上，让 Windows 自动管理页面文件的大小（系统 > 高级系统设置 > 性能 > 虚拟内存），然后重启",
    ),
    "explain.ram_oom": (
        "the system had no {mb:.0f} MB of RAM left for one tensor",
        "系统的内存不足以再分配一个 {mb:.0f} MB 的张量",
    ),
    "explain.ram_oom_do": (
        "close other programs, enlarge the page file, or take a smaller model file or text encoder (T5 in fp8)",
        "关闭其他程序、增大页面文件（虚拟内存），或换用更小的模型文件或文本编码器（fp8 的 T5）",
    ),
    "explain.memory_error": (
        "Python got no more RAM from the system (MemoryError)",
        "系统无法再为 Python 分配内存（MemoryError）",
    ),
    "explain.memory_error_do": (
        "close other programs, enlarge the page file, or take a smaller model file or text encoder (T5 in fp8)",
        "关闭其他程序、增大页面文件（虚拟内存），或换用更小的模型文件或文本编码器（fp8 的 T5）",
    ),
    "explain.crashed": (
        "the program crashed ({what}): a fault in a driver or in a compiled library, not in a setting",
        "程序崩溃（{what}）：问题出在驱动或编译的库中，而不是设置",
    ),
    "explain.crashed_do": (
        "update the graphics driver and take out what was installed last (triton, xformers, an extension); if it happens only while large "
        "files are read, enlarge the page file",
        "请更新显卡驱动，并移除最近安装的内容（triton、xformers 或某个扩展）；如果只在读取大文件时发生，请增大页面文件（虚拟内存）",
    ),
    # Memory of the card.
    "explain.driver_oom": (
        "the driver ran out of memory with the swap location 'Shared' (pinned RAM): that RAM cannot go to the page file",
        "交换位置为“Shared”（锁页内存）时驱动的内存用尽：这部分内存不能放入页面文件",
    ),
    "explain.driver_oom_do": (
        "set the swap location to 'CPU' and the swap method to 'Queue', and leave --pin-shared-memory and --cuda-stream out",
        "把交换位置改为“CPU”，交换方式改为“Queue”，并去掉 --pin-shared-memory 与 --cuda-stream",
    ),
    "explain.merge_oom": (
        "the card ran out of memory while a LoRA was merged ({layers} layers failed; {size}). A merge needs three copies of a layer in "
        "fp32, which no estimate of Forge counts. What follows is slow, or made without the LoRA",
        "合并 LoRA 时显存用尽（{layers} 层失败；{size}）。合并需要一层的三份 fp32 副本，Forge 的任何估算都不计入这部分显存。"
        "之后会很慢，或者图片中没有这个 LoRA",
    ),
    "explain.merge_oom_do": (
        "lower 'GPU Weights' by 1000 MB, or set 'Diffusion in Low Bits' to 'Automatic (fp16 LoRA)'. LoRA Guard merges nothing into low-bit "
        "weights",
        "把“GPU Weights”调低 1000 MB，或把“Diffusion in Low Bits”设为“Automatic (fp16 LoRA)”。LoRA Guard 不会把 LoRA 合并到低精度权重",
    ),
    "explain.merge_failed": (
        "merging a LoRA failed in {layers} layers (first {key}: {why}); Forge calls that out of memory whatever it was",
        "有 {layers} 层合并 LoRA 失败（第一处 {key}：{why}）；无论什么原因，Forge 都会报告为显存不足",
    ),
    "explain.merge_failed_do": (
        "the LoRA is most likely made for another model or is of a kind that this version does not know: check it with "
        "'lora-guard inspect LORA --model MODEL'",
        "这个 LoRA 很可能适用于别的模型，或属于此版本不支持的类型：可用 “lora-guard inspect LORA --model MODEL” 检查",
    ),
    "explain.oom": (
        "the card ran out of memory ({size})",
        "显存用尽（{size}）",
    ),
    "explain.oom_do": (
        "lower 'GPU Weights' by 1000 MB (in Neo: --reserve-vram 2), make the picture smaller, or take a model file in fewer bits; close "
        "programs that hold VRAM",
        "把“GPU Weights”调低 1000 MB（Neo：--reserve-vram 2），缩小图片，或换用量化位数更低的模型文件；关闭占用显存的程序",
    ),
    "explain.fragments": (
        "torch held {gb:.1f} GB of VRAM in pieces that were too small to use (fragmentation)",
        "torch 占用了 {gb:.1f} GB 显存，但都是太小而无法使用的碎片",
    ),
    "explain.fragments_do": (
        "on Linux start with PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True; on Windows, where that is not supported in most versions, lower "
        "'GPU Weights' by 1000 MB. LoRA Guard's tab says which option works here",
        "在 Linux 上启动前设置 PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True；Windows 的多数版本不支持，请把“GPU Weights”调低 1000 MB。"
        "LoRA Guard 标签页会说明本机可用的选项",
    ),
    "explain.sysmem": (
        "VRAM was nearly full while sampling ({mb:.0f} MB free, told {count} times): on Windows the driver then goes on in system RAM, and a "
        "step takes 5 to 30 times as long",
        "采样时显存几乎用尽（空闲 {mb:.0f} MB，提示了 {count} 次）：Windows 的驱动这时会改用系统内存，每一步的用时会变成 5 至 30 倍",
    ),
    "explain.sysmem_do": (
        "lower 'GPU Weights' by 1000 MB; in the NVIDIA control panel set 'CUDA - Sysmem Fallback Policy' to 'Prefer No Sysmem Fallback'",
        "把“GPU Weights”调低 1000 MB；在 NVIDIA 控制面板中把“CUDA - Sysmem Fallback Policy”（CUDA - 系统内存回退策略）设为“Prefer No Sysmem Fallback”",
    ),
    "explain.slow_steps": (
        "steps became slower: from {least:.1f} s to {most:.1f} s each",
        "每一步变慢：从 {least:.1f} 秒变为 {most:.1f} 秒",
    ),
    "explain.slow_steps_do": (
        "VRAM spilled into system RAM, or more of the model is swapped than before: lower 'GPU Weights' by 1000 MB, turn NVIDIA's sysmem "
        "fallback off, or take a model file in fewer bits",
        "显存溢出到了系统内存，或有更多模型权重被换出：把“GPU Weights”调低 1000 MB，关闭 NVIDIA 的系统内存回退，或换用量化位数更低的模型文件",
    ),
    "explain.stuck_step": (
        "a step took {seconds:.0f} s, where some seconds are usual",
        "有一步用了 {seconds:.0f} 秒，而通常只需几秒",
    ),
    "explain.stuck_step_do": (
        "VRAM spilled into system RAM: lower 'GPU Weights' by 1000 MB (in Neo: --reserve-vram 2), turn NVIDIA's sysmem fallback off, or take a "
        "model file in fewer bits",
        "显存溢出到了系统内存：把“GPU Weights”调低 1000 MB（Neo：--reserve-vram 2），关闭 NVIDIA 的系统内存回退，或换用量化位数更低的模型文件",
    ),
    # Time.
    "explain.patch_slow": (
        "patching the LoRAs into the model took {seconds:.0f} s ({count} times that long): Forge restores and merges every weight anew at each "
        "change of a file or a strength, those that lie in RAM on the processor",
        "把 LoRA 合并进模型用了 {seconds:.0f} 秒（如此慢的有 {count} 次）：每次更换文件或强度，Forge 都会还原并重新合并所有权重，"
        "放在内存中的权重由处理器计算",
    ),
    "explain.patch_slow_do": (
        "set 'Diffusion in Low Bits' to 'Automatic (fp16 LoRA)' where the model is fp8, NF4 or GGUF. With LoRA Guard a change moves the LoRA alone",
        "模型为 fp8、NF4 或 GGUF 时，把“Diffusion in Low Bits”设为“Automatic (fp16 LoRA)”。使用 LoRA Guard 时，更换只会移动 LoRA 本身",
    ),
    "explain.moving_slow": (
        "moving a model took {seconds:.0f} s: that is the speed of a page file or of a slow disk, not of RAM",
        "移动一个模型用了 {seconds:.0f} 秒：这是页面文件或慢速磁盘的速度，而不是内存的速度",
    ),
    "explain.moving_slow_do": (
        "RAM is short: close other programs, take a smaller model file or text encoder (T5 in fp8), and keep models and page file on an SSD",
        "内存不足：关闭其他程序，换用更小的模型文件或文本编码器（fp8 的 T5），并把模型与页面文件放在固态硬盘上",
    ),
    "explain.reloads": (
        "the image model was brought to the card {count} times, {seconds:.0f} s of moving in all: it does not stay there beside the text encoder",
        "图像模型被载入显卡 {count} 次，移动共用时 {seconds:.0f} 秒：显存放不下它和文本编码器",
    ),
    "explain.reloads_do": (
        "take a model file in fewer bits or a smaller text encoder, so that both fit; prompts and LoRAs that change one at a time cost less. LoRA "
        "Guard moves no layer for a change of a LoRA",
        "换用量化位数更低的模型文件或更小的文本编码器，使两者能同时放下；每次只更改提示词或 LoRA 之一会更省时。"
        "更换 LoRA 时，LoRA Guard 不移动任何层",
    ),
    "explain.swap": (
        "{mb:.0f} MB of the model did not fit on the card and are copied in every step",
        "模型有 {mb:.0f} MB 放不进显卡，每一步都要复制",
    ),
    "explain.swap_do": (
        "a model file in fewer bits (GGUF Q4, NF4) stays on the card whole: 'lora-guard plan MODEL LORA' names one that fits",
        "量化位数更低的模型文件（GGUF Q4、NF4）可以完整地留在显卡上：“lora-guard plan MODEL LORA” 会给出合适的文件",
    ),
    # LoRAs.
    "explain.stage_failed": (
        "Forge failed when it loaded the LoRAs of the prompt, and made the image without any of them: one file that is missing is enough",
        "Forge 加载提示词中的 LoRA 时出错，生成的图片中一个 LoRA 都没有：只要缺一个文件就会这样",
    ),
    "explain.stage_failed_do": (
        "check the names in the prompt against the Lora tab (Refresh). LoRA Guard leaves out the missing one alone, and says so",
        "在 Lora 标签页点击刷新，对照检查提示词中的名称。LoRA Guard 只略过缺少的那一个，并会说明",
    ),
    "explain.missing": (
        "LoRAs of the prompt were not found: {names}",
        "找不到提示词中的 LoRA：{names}",
    ),
    "explain.missing_do": (
        "put the files into models/Lora, press Refresh in the Lora tab, and write the names as they stand there",
        "把文件放入 models/Lora，在 Lora 标签页中点击刷新，并按其中显示的名称填写",
    ),
    "explain.damaged": (
        "a model or LoRA file is damaged or not complete",
        "有一个模型或 LoRA 文件已损坏或不完整",
    ),
    "explain.damaged_do": (
        "download it again; 'lora-guard inspect FILE' says what is wrong with a LoRA file",
        "请重新下载；“lora-guard inspect FILE” 会说明 LoRA 文件的问题",
    ),
    "explain.other_model": (
        "{files} not applied: too many of its keys have no place in this model (it is made for another one, or of a kind that this Forge does "
        "not know)",
        "{files} 未应用：它的键有太多在此模型中没有对应位置（它适用于别的模型，或属于此版 Forge 不支持的类型）",
    ),
    "explain.other_model_do": (
        "take a LoRA for this model; 'lora-guard inspect LORA --model MODEL' says what it is made for and how much of it fits",
        "请使用适合此模型的 LoRA；“lora-guard inspect LORA --model MODEL” 会说明它适用的模型以及匹配的比例",
    ),
    "explain.mismatched": (
        "{files} not applied: {keys} keys did not match beside {of} that did",
        "{files} 未应用：有 {keys} 个键不匹配，{of} 个匹配",
    ),
    "explain.mismatched_do": (
        "take a LoRA for this model; 'lora-guard inspect LORA --model MODEL' says which keys do not fit and why",
        "请使用适合此模型的 LoRA；“lora-guard inspect LORA --model MODEL” 会说明哪些键不匹配及其原因",
    ),
    "explain.unmatched": (
        "{keys} keys of {files} are not applied: they have no place in this model",
        "{files} 有 {keys} 个键未应用：此模型中没有对应的位置",
    ),
    "explain.unmatched_do": (
        "where these are keys of a text encoder that is not loaded, it is harmless; else the LoRA is weaker than meant: "
        "'lora-guard inspect LORA --model MODEL' names them",
        "如果这些键属于没有加载的文本编码器，则无害；否则 LoRA 的效果会偏弱：“lora-guard inspect LORA --model MODEL” 会列出它们",
    ),
    "explain.not_loaded": (
        "{count} keys of a LoRA were not loaded (first: {key})",
        "LoRA 有 {count} 个键没有加载（第一个：{key}）",
    ),
    "explain.not_loaded_do": (
        "update Forge; 'lora-guard inspect LORA --model MODEL' says whether the LoRA fits this model",
        "请更新 Forge；“lora-guard inspect LORA --model MODEL” 会说明这个 LoRA 是否适合此模型",
    ),
    "explain.shape": (
        "{count} layers were not merged, because the LoRA has other sizes than the model (first: {key})",
        "有 {count} 层没有合并，因为 LoRA 的尺寸与模型不同（第一处：{key}）",
    ),
    "explain.shape_do": (
        "the LoRA is made for another model; take one for this model",
        "这个 LoRA 适用于别的模型；请使用适合此模型的 LoRA",
    ),
    "explain.odd_patch": (
        "{count} layers have a patch that this version does not know ({kind})",
        "有 {count} 层的补丁类型是此版本不支持的（{kind}）",
    ),
    "explain.odd_patch_do": (
        "update the WebUI, or turn off the extension that brings the patch (LayerDiffuse and Fooocus inpaint bring such)",
        "请更新 WebUI，或停用带来此补丁的扩展（LayerDiffuse 与 Fooocus 局部重绘会带来这类补丁）",
    ),
    "explain.low_bit": (
        "Forge cannot merge a LoRA into this storage ({types}); it can into Q4_0, Q5_0 and Q8_0",
        "Forge 无法把 LoRA 合并到这种存储格式（{types}）；只能合并到 Q4_0、Q5_0 与 Q8_0",
    ),
    "explain.low_bit_do": (
        "set 'Diffusion in Low Bits' to 'Automatic (fp16 LoRA)', or use LoRA Guard, which merges nothing there",
        "把“Diffusion in Low Bits”设为“Automatic (fp16 LoRA)”，或使用 LoRA Guard（不做合并）",
    ),
    "explain.rounded": (
        "{files} was merged into {storage}, which rounds most of it away: little or nothing of the LoRA is seen in the picture",
        "{files} 被合并到 {storage}，大部分会因舍入而消失：图片中几乎看不到这个 LoRA",
    ),
    "explain.rounded_do": (
        "set 'Diffusion in Low Bits' to 'Automatic (fp16 LoRA)', or use LoRA Guard; a higher strength does not bring it back",
        "把“Diffusion in Low Bits”设为“Automatic (fp16 LoRA)”，或使用 LoRA Guard；提高强度并不能找回效果",
    ),
    "explain.wish_ignored": (
        "'fp16 LoRA' was chosen and not used: Forge ignores it where the model is stored as {storage}, and merges all the same",
        "选择了“fp16 LoRA”但没有生效：模型以 {storage} 存储时 Forge 会忽略它，照样合并",
    ),
    "explain.wish_ignored_do": (
        "nothing to change if it is fast enough; LoRA Guard's mode 'fp16 LoRA' works there too",
        "速度可以接受的话无需更改；LoRA Guard 的“fp16 LoRA”模式在此也有效",
    ),
    # Settings.
    "explain.bad_setting": (
        "'GPU Weights' leaves {mb:.0f} MB for computing{card}: a pasted prompt or a preset may have set it",
        "“GPU Weights”只留下 {mb:.0f} MB 用于计算{card}：可能是粘贴的提示词或预设改了它",
    ),
    "explain.bad_setting_do": (
        "set 'GPU Weights' to the card's memory less 1000 to 2000 MB",
        "把“GPU Weights”设为显存大小减去 1000 至 2000 MB",
    ),
    "explain.all_weights": (
        "'GPU Weights' is at 100 %: nothing of the card is left for computing",
        "“GPU Weights”为 100 %：显卡上没有留下用于计算的显存",
    ),
    "explain.all_weights_do": (
        "set it to the card's memory less 1000 to 2000 MB",
        "请设为显存大小减去 1000 至 2000 MB",
    ),
    "explain.removed_flag": (
        "a start option has no meaning any more: {flags}",
        "有启动参数已经失效：{flags}",
    ),
    "explain.removed_flag_do": (
        "take it out of COMMANDLINE_ARGS",
        "请从 COMMANDLINE_ARGS 中删除",
    ),
    # Others.
    "explain.leak": (
        "a model that is out of use stays in memory ({models}): memory grows with each change of the model",
        "不再使用的模型仍留在内存中（{models}）：每次更换模型都会占用更多内存",
    ),
    "explain.leak_do": (
        "restart the program; if it comes back, turn extensions off one by one: one of them holds the model",
        "请重启程序；如果再次出现，请逐个停用扩展：其中某个扩展仍占用着该模型",
    ),
    "explain.nan": (
        "the model gave values that are no numbers (NaN), told {count} times: the picture is black",
        "模型输出了 NaN（非数值），提示了 {count} 次：图片会是全黑的",
    ),
    "explain.nan_do": (
        "take the LoRAs out one by one, use another VAE, and start without --cuda-malloc",
        "逐个去掉 LoRA，换用其他 VAE，并去掉 --cuda-malloc 启动参数",
    ),
    "explain.vae_tiled": (
        "VRAM did not suffice for the VAE ({count} times): the picture was decoded in tiles",
        "显存不足以运行 VAE（{count} 次）：图片改为分块解码",
    ),
    "explain.vae_tiled_do": (
        "nothing, if the picture is good; else lower 'GPU Weights' or make the picture smaller",
        "如果图片正常则无需处理；否则请调低“GPU Weights”或缩小图片",
    ),
    "explain.attention_sliced": (
        "VRAM did not suffice for attention ({count} times): it was taken in slices, which is slower",
        "显存不足以计算注意力（{count} 次）：改为分片计算，速度更慢",
    ),
    "explain.attention_sliced_do": (
        "lower 'GPU Weights' by 1000 MB or make the picture smaller",
        "把“GPU Weights”调低 1000 MB，或缩小图片",
    ),
    "explain.sentinel": (
        "'Trying to free {mb} MB' is no miscalculation: it means 'unload everything' (1e30 bytes), in versions before 2024-08-21",
        "“Trying to free {mb} MB” 并非计算错误：它表示“全部卸载”（1e30 字节），见于 2024-08-21 之前的版本",
    ),
    "explain.sentinel_do": ("nothing; newer versions write 'all memory'", "无需处理；新版本会写成 “all memory”"),
    "explain.evict_all": (
        "asking to free {mb:.0f} MB on a card of {vram_mb:.0f} MB means that every other model is unloaded first (Forge asks for 1.3 times the "
        "model)",
        "在 {vram_mb:.0f} MB 的显卡上要求释放 {mb:.0f} MB，意思是先卸载所有其他模型（Forge 会要求模型大小的 1.3 倍）",
    ),
    "explain.evict_all_do": (
        "nothing; it costs the time to load them again",
        "无需处理；代价是之后重新加载它们的时间",
    ),
    "explain.no_expandable": (
        "torch does not know expandable segments on this system (told {count} times), and goes on without them",
        "此系统上的 torch 不支持 expandable segments（提示了 {count} 次），会在没有它的情况下继续运行",
    ),
    "explain.no_expandable_do": (
        "nothing, or take it out of PYTORCH_CUDA_ALLOC_CONF",
        "无需处理，或从 PYTORCH_CUDA_ALLOC_CONF 中去掉它",
    ),
}
