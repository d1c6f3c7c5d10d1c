"""The options of torch's CUDA allocator."""

from __future__ import annotations

# English, Simplified Chinese.
TEXTS: dict[str, tuple[str, str]] = {
    # Availability of an option.
    "allocator.no_cuda": (
        "not available here: images are made on {device}, and this is an option of torch's CUDA allocator",
        "此处不可用：图片在 {device} 上生成，而这是 torch 的 CUDA 显存分配器的选项",
    ),
    "allocator.backend": (
        "not available here: torch uses the {backend} allocator, which ignores this option; start Forge without --cuda-malloc to get it",
        "此处不可用：torch 正在使用 {backend} 分配器，它会忽略此选项；如需使用，请去掉 --cuda-malloc 后启动 Forge",
    ),
    "allocator.windows": (
        "not available here: torch {torch} has no expandable segments on Windows and would ignore the option; torch {since} is the first that may have them",
        "此处不可用：torch {torch} 在 Windows 上没有可扩展段，会忽略此选项；torch {since} 起才可能支持",
    ),
    "allocator.wsl": (
        "not available here: under WSL the graphics driver refuses expandable segments, on some machines only in the middle of an image",
        "此处不可用：在 WSL 中显卡驱动会拒绝可扩展段，有些机器甚至在生成图片途中才出错",
    ),
    "allocator.tegra": (
        "not available here: on Jetson boards the first allocation with expandable segments fails",
        "此处不可用：在 Jetson 设备上，启用可扩展段后的第一次显存分配就会失败",
    ),
    "allocator.rocm": (
        "not available here: on AMD cards torch has no expandable segments, or hung in them for good",
        "此处不可用：在 AMD 显卡上，torch 没有可扩展段，或曾因此永久卡死",
    ),
    "allocator.bad_environment": (
        "not available: the variable {variable} cannot be read ({why}); correct or remove it in the file that Forge is started with",
        "不可用：无法读懂环境变量 {variable}（{why}）；请在启动 Forge 的脚本中改正或删除它",
    ),
    # Reasons for refusing an option.
    "allocator.beside_expandable": (
        "not used beside expandable segments: those are never split at this size and never collected, and older torch could stop at the mixture",
        "启用可扩展段时不使用：可扩展段不受此大小限制，也不会被回收，旧版 torch 还可能因混用而中断",
    ),
    "allocator.split_least": (
        "not used: torch takes {least} MB or more; 0 leaves it to torch",
        "未使用：torch 只接受 {least} MB 及以上的值；填 0 表示由 torch 决定",
    ),
    "allocator.threshold_range": (
        "not used: torch takes numbers between 0 and 1, for example 0.8; 0 leaves it to torch",
        "未使用：torch 只接受 0 与 1 之间的数，例如 0.8；填 0 表示由 torch 决定",
    ),
    "allocator.refused": (
        'not used: torch refused "{text}" ({error}); the settings from before hold',
        "未使用：torch 拒绝了“{text}”（{error}）；仍沿用之前的设置",
    ),
    "allocator.not_restored": (
        'torch refused to go back to "{text}" ({error})',
        "torch 拒绝恢复为“{text}”（{error}）",
    ),
    "allocator.ignored": (
        "not in force: {wanted} was set, but torch reports {found}",
        "未生效：已设为 {wanted}，但 torch 报告的是 {found}",
    ),
    "allocator.driver": (
        "not available here: the graphics driver refused the first allocation ({error}); switched off again",
        "此处不可用：显卡驱动拒绝了第一次分配（{error}）；已重新关闭",
    ),
    "allocator.not_expandable": (
        "not available here: torch says yes, but a fresh allocation was not expandable; switched off again",
        "此处不可用：torch 声称已启用，但新分配的显存并不可扩展；已重新关闭",
    ),
    # The present state.
    "allocator.off": ("off", "关闭"),
    "allocator.still_on": (
        "still on, with {found}; a restart of Forge ends it",
        "仍在生效（{found}）；重启 Forge 即可关闭",
    ),
    "allocator.by_environment": ("{value}, set by {variable}", "{value}，由环境变量 {variable} 设置"),
    "allocator.proven": ("on, proven by an allocation", "已启用，并经一次实际分配验证"),
    "allocator.no_room": (
        "on, as torch reports; could not be proven: no room on the card for an allocation",
        "torch 报告已启用；未能验证：显存中没有空间进行一次分配",
    ),
    "allocator.unproven": (
        "on, as torch reports; could not be proven: the allocation was served from memory held before",
        "torch 报告已启用；未能验证：分配由先前持有的显存满足",
    ),
    "allocator.active_max_split_size_mb": (
        "{value} MB, as torch reports: larger free blocks are kept whole",
        "{value} MB（torch 的报告）：更大的空闲块不再拆分",
    ),
    "allocator.active_garbage_collection_threshold": (
        "{value}, as torch reports: above this part of the card's memory, unused blocks are handed back. Torch does this only in a process that is capped, so Forge's memory is now limited to 99 % of the card until it is restarted",
        "{value}（torch 的报告）：占用超过显存的这一比例时，会归还未使用的块。torch 只在设有上限的进程中这样做，因此在重启之前，Forge 占用的显存不会超过显卡容量的 99%",
    ),
    "allocator.new_memory": (
        'applies to memory taken from now on; "Unload all models" or a restart of Forge moves everything',
        "只对今后分配的显存生效；“卸载全部模型”或重启 Forge 后全部生效",
    ),
    "allocator.next_start": (
        "from the next start of Forge: this torch cannot change it while it runs. {line}",
        "下次启动 Forge 时生效：此版本的 torch 无法在运行中更改。{line}",
    ),
    "allocator.no_read_back": (
        "was set, but this torch does not report it; sure from the next start of Forge. {line}",
        "已设置，但此版本的 torch 无法回报结果；下次启动 Forge 时可确保生效。{line}",
    ),
    "allocator.line": ("Put this line into {file}: {line}", "请在 {file} 中加入这一行：{line}"),
    # Errors in an allocator string.
    "allocator.text_no_pair": (
        'allocator settings "{text}": expected key:value, found "{part}"',
        "分配器设置“{text}”：应为“键:值”，实际为“{part}”",
    ),
    "allocator.text_no_comma": (
        'allocator settings "{text}": expected a comma before "{part}"',
        "分配器设置“{text}”：“{part}”之前缺少逗号",
    ),
    "allocator.text_no_word": (
        'allocator settings "{text}": "{part}" contains signs that belong to no setting',
        "分配器设置“{text}”：“{part}”含有任何设置都不会用到的字符",
    ),
    "allocator.text_no_value": (
        'allocator settings "{text}": "{part}" has no value',
        "分配器设置“{text}”：“{part}”没有值",
    ),
    "allocator.text_open_list": (
        'allocator settings "{text}": a list is opened with [ and not closed',
        "分配器设置“{text}”：列表以 [ 开始，却没有结束",
    ),
    "allocator.text_bad_value": (
        'allocator settings "{text}": {part} cannot be "{value}"',
        "分配器设置“{text}”：{part} 不能为“{value}”",
    ),
}
