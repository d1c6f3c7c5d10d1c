"""Reasons why a LoRA, or a part of it, cannot be applied."""

from __future__ import annotations

# English, Simplified Chinese.
TEXTS: dict[str, tuple[str, str]] = {
    # The file's content.
    "lora.container": (
        "expected a LoRA in safetensors format, found a {container} model; choose a LoRA, or load this file as the model",
        "应为 safetensors 格式的 LoRA，但该文件是 {container} 模型；请选择 LoRA，或将此文件作为模型加载",
    ),
    "lora.none": (
        "no LoRA keys found among {count} tensors; is this a checkpoint?",
        "{count} 个张量中没有任何 LoRA 键；这是不是完整的模型（checkpoint）？",
    ),
    "lora.too_large": (
        "its tensors take {needed_mb:.0f} MB of RAM and {room_mb:.0f} MB are left; close other programs, make the page file at least "
        "{more_gb} GB larger, or use a LoRA of a smaller rank",
        "其张量需要 {needed_mb:.0f} MB 内存，而剩余的只有 {room_mb:.0f} MB；请关闭其他程序、将页面文件至少增大 {more_gb} GB，"
        "或使用秩更小的 LoRA",
    ),
    "lora.packed": (
        "it is stored as {format}, which cannot be calculated with; get the file in F16 or BF16, or convert it",
        "存储格式为 {format}，无法用于计算；请获取 F16 或 BF16 格式的文件，或自行转换",
    ),
    "lora.settings_too_long": (
        "its adapter settings have {found} characters, {most} at most are read; save the LoRA again with the settings of its own "
        "modules alone",
        "适配器设置有 {found} 个字符，最多读取 {most} 个；请重新保存该 LoRA，只保留其自身模块的设置",
    ),
    "lora.two_changes": (
        "{module} has two changes of its {parameter}; the file is damaged",
        "{module} 的 {parameter} 有两处不同的修改；文件已损坏",
    ),
    "lora.two_kinds": (
        "{module} is described as {kinds} at once; the file is damaged",
        "{module} 同时被描述为 {kinds}；文件已损坏",
    ),
    "lora.incomplete": (
        "{module} is incomplete (a {kind} without {missing}); download the file again",
        "{module} 不完整（{kind} 缺少 {missing}）；请重新下载文件",
    ),
    "lora.not_factors": (
        "{module}: its factors {found} cannot be those of a {kind} ({why}); the file is damaged",
        "{module}：其因子 {found} 不可能属于 {kind}（{why}）；文件已损坏",
    ),
    "lora.said_twice": (
        "{first} and {second} say the same thing twice; the file is damaged",
        "{first} 与 {second} 描述的是同一内容；文件已损坏",
    ),
    "lora.several_values": (
        "{key} has {count} values instead of one; the file is damaged",
        "{key} 应只有一个值，实际有 {count} 个；文件已损坏",
    ),
    "lora.not_floating": (
        "it is stored as {dtype}, floating-point numbers were expected",
        "存储类型为 {dtype}，应为浮点数",
    ),
    "lora.not_finite": (
        "it holds values that are not finite numbers (NaN or Inf); download or train it again",
        "含有非有限数值（NaN 或 Inf）；请重新下载或重新训练",
    ),
    "lora.no_usable_number": ("its {name} is {number}, not a usable number", "{name} 为 {number}，不是可用的数值"),
    "lora.strength": ("strength", "强度"),
    "lora.model_strength": ("model strength", "模型强度"),
    "lora.alpha": ("alpha", "alpha"),
    "lora.no_usable_alpha": (
        "its settings ask for an alpha that is no usable number",
        "其设置要求的 alpha 不是可用的数值",
    ),
    "lora.settings_unreadable": (
        "its adapter settings are not readable JSON, so its alpha is not known and 1 is used",
        "适配器设置不是有效的 JSON，无法得知 alpha，按 1 处理",
    ),
    "lora.single_number": ("a single number where a factor belongs", "本应是因子的位置只有一个数值"),
    "lora.core": ("a core of far more than its rank", "核心张量远大于其秩"),
    # The match with the model.
    "lora.size": (
        "{what} gives {found}, the weight is {wanted}",
        "{what} 得到 {found}，而权重为 {wanted}",
    ),
    "lora.outside": (
        "addresses entries {start}..{end} of dimension {dim}, the weight is {shape}",
        "指向第 {dim} 维的 {start}..{end}，而权重为 {shape}",
    ),
    "lora.rank": (
        "its rank is {rank}, far more than a weight of {shape} has",
        "其秩为 {rank}，远超大小为 {shape} 的权重所能有的秩",
    ),
    "lora.no_pair": ("factors {up} and {down} are no pair of matrices", "因子 {up} 与 {down} 不是一对矩阵"),
    "lora.up_down": ("up {up} and down {down} do not multiply{core}", "up {up} 与 down {down} 无法相乘{core}"),
    "lora.not_matrices": ("{what} must be matrices, found {found}", "{what} 应为矩阵，实际为 {found}"),
    "lora.no_product": ("{what} do not multiply: {found}", "{what} 无法相乘：{found}"),
    "lora.not_both_matrices": ("{what} must be matrices, found {a} and {b}", "{what} 应为矩阵，实际为 {a} 和 {b}"),
    "lora.pair_no_product": ("{what} {a} and {b} do not multiply", "{what} {a} 与 {b} 无法相乘"),
    "lora.wrong_form": ("{what} must be {wanted}, found {found}", "{what} 应为 {wanted}，实际为 {found}"),
    "lora.odd_blocks": ("BOFT blocks must have an even size, found {found}", "BOFT 块的大小应为偶数，实际为 {found}"),
    "lora.made_for": (
        "made for {lora}, this is {model}; use a LoRA for {model}, or load a {lora} model",
        "此 LoRA 用于 {lora}，当前模型是 {model}；请使用适用于 {model} 的 LoRA，或加载 {lora} 模型",
    ),
    "lora.other_model": (
        "made for another model: {key}: {why}; use a LoRA made for this model",
        "此 LoRA 用于其他模型：{key}：{why}；请使用适用于此模型的 LoRA",
    ),
    "lora.damaged_key": (
        "its {key} cannot be read ({error}); the file is damaged",
        "其中的 {key} 无法读取（{error}）；文件已损坏",
    ),
    "lora.unreadable_key": ("{key} cannot be read ({error})", "{key} 无法读取（{error}）"),
    "lora.no_parameter": (
        "{module}: the LoRA changes its {parameter}, this model has none there; use a LoRA made for this model",
        "{module}：LoRA 要修改其 {parameter}，但当前模型没有；请使用适用于此模型的 LoRA",
    ),
    "lora.said_already": ("says what {other} says already", "与 {other} 的内容重复"),
    "lora.cannot_split": (
        "a {kind} for several layers at once cannot be taken apart for this model",
        "针对多个层的 {kind} 无法为当前模型拆分",
    ),
    "lora.overflow": (
        "the patched values do not fit into {dtype}; the LoRA is damaged or its strength far too high",
        "应用后的数值超出 {dtype} 的范围；LoRA 已损坏，或强度过高",
    ),
    "lora.patch_fields": ("a patch has {count} fields, 5 are expected", "补丁有 {count} 个字段，应为 5 个"),
    "lora.patch_value": ("a patch value of type {kind} is not known", "未知的补丁值类型 {kind}"),
    "lora.patch_content": (
        "a patch of kind '{kind}' does not have the fields expected: {error}",
        "类型为“{kind}”的补丁字段不符合预期：{error}",
    ),
    "lora.patch_kind": ("a patch of kind '{kind}' is not known", "未知的补丁类型“{kind}”"),
}
