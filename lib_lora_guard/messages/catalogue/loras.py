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
        "no LoRA keys found among {count} tensors (first: {first}), so it can change nothing; load a checkpoint as the model, else download "
        "the file again",
        "{count} 个张量中没有任何 LoRA 键（第一个：{first}），因此不会有任何效果；如果这是完整的模型（checkpoint），请作为模型加载，否则请重新下载",
    ),
    "lora.too_large": (
        "its tensors take {needed_mb:.0f} MB of RAM and {room_mb:.0f} MB are left; close other programs, make the page file at least "
        "{more_gb} GB larger, or use a LoRA of a smaller rank",
        "其张量需要 {needed_mb:.0f} MB 内存，而剩余的只有 {room_mb:.0f} MB；请关闭其他程序、将页面文件（虚拟内存）至少增大 {more_gb} GB，"
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
    "lora.no_usable_strength": (
        "its {name} is {number}, not a usable number; choose one such as 0.8",
        "{name} 为 {number}，不是可用的数值；请改用 0.8 之类的数值",
    ),
    "lora.beyond_fp32": (
        "it holds numbers as large as {largest:.1e}, and fp32 ends at 3.4e+38: its training went wrong; train it again",
        "含有大至 {largest:.1e} 的数值，而 fp32 的上限为 3.4e+38：训练已失控；请重新训练",
    ),
    "lora.strength": ("strength", "强度"),
    "lora.model_strength": ("model strength", "模型强度"),
    "lora.alpha": ("alpha", "alpha"),
    "lora.no_usable_alpha": (
        "its settings ask for an alpha that is no usable number",
        "其设置要求的 alpha 不是可用的数值",
    ),
    "lora.no_usable_eps": (
        "its settings bound its rotations by an eps that is no usable number",
        "其设置用于限制旋转的 eps 不是可用的数值",
    ),
    "lora.part_not_known": (
        "{module}: {part} is a part of its {kind} that LoRA Guard does not know, and the rest alone would be wrong; "
        "use a file that was exported without it, or a newer LoRA Guard",
        "{module}：{part} 是其 {kind} 中 LoRA Guard 不认识的部分，只应用其余部分会得到错误结果；"
        "请使用不含该部分的文件，或更新 LoRA Guard",
    ),
    "lora.oft_marker": (
        "{module}: its OFT is scaled in a way that LoRA Guard does not know (oft_R.scaled_oft is {value}), and unscaled "
        "it would turn the weights too far; train it again with a released OneTrainer, or use a newer LoRA Guard",
        "{module}：其 OFT 的缩放方式 LoRA Guard 不认识（oft_R.scaled_oft 为 {value}），不缩放会使权重旋转过度；"
        "请用正式版 OneTrainer 重新训练，或更新 LoRA Guard",
    ),
    "lora.no_dora": (
        "{module}: it has a DoRA magnitude (dora_scale) beside its {kind}, and no trainer defines the two together; "
        "train it again without DoRA",
        "{module}：它在 {kind} 旁带有 DoRA 幅值（dora_scale），而没有任何训练器定义过二者的组合；请不带 DoRA 重新训练",
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
    "lora.grouped": (
        "the layer has {groups} groups of channels, and the LoRA reads all channels for each of them, which no weight of "
        "this layer can hold; train it without this layer",
        "该层分为 {groups} 组通道，而 LoRA 的每一组都读取全部通道，该层的权重无法容纳这样的修改；请在训练时排除该层",
    ),
    "lora.grows_rows": (
        "the LoRA asks for {rows} outputs of this layer (reshape_weight), and the layer after it takes {wanted}; use the "
        "model that it was trained on",
        "LoRA 要求该层有 {rows} 个输出（reshape_weight），而其后的层只接受 {wanted} 个；请使用其训练时所用的模型",
    ),
    "lora.narrow_dora": (
        "its DoRA magnitude is for fewer input channels than the weight {shape} has; use the model that it was trained on",
        "其 DoRA 幅值对应的输入通道少于权重 {shape}；请使用其训练时所用的模型",
    ),
    "lora.no_pair": ("factors {up} and {down} are no pair of matrices", "因子 {up} 与 {down} 不是一对矩阵"),
    "lora.up_down": ("up {up} and down {down} do not multiply{core}", "up {up} 与 down {down} 无法相乘{core}"),
    "lora.not_matrices": ("{what} must be matrices, found {found}", "{what} 应为矩阵，实际为 {found}"),
    "lora.no_product": ("{what} do not multiply: {found}", "{what} 无法相乘：{found}"),
    "lora.oft_one_block": (
        "its OFT has one block of {size} and the weight is {shape}: the file does not say whether the block is for all "
        "inputs (block_share) or for the first {size}; use the model that it was trained on, or keep its "
        "adapter_config.json beside it",
        "其 OFT 只有一个大小为 {size} 的块，而权重为 {shape}：文件没有说明该块用于全部输入（block_share）还是仅用于前 {size} 个；"
        "请使用其训练时所用的模型，或将其 adapter_config.json 放在文件旁边",
    ),
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
    "lora.damaged_layer": (
        "{key}: {why}; the file is damaged, download it again",
        "{key}：{why}；文件已损坏，请重新下载",
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
