"""What a LoRA file says, and what of it is not understood."""

from __future__ import annotations

# English, Simplified Chinese.
TEXTS: dict[str, tuple[str, str]] = {
    # Settings.
    "lora.pattern": (
        "its settings choose modules by '{pattern}', an expression that is not understood{why}; save the LoRA again with "
        "the names of the modules in full",
        "其设置用表达式“{pattern}”选择模块，无法识别{why}；请改用完整的模块名称重新保存该 LoRA",
    ),
    "lora.pattern_why": (" ({why})", "（{why}）"),
    "lora.patterns_too_long": (
        "its settings choose modules by expressions that are too long together (at '{pattern}'); save the LoRA again with "
        "the names of the modules in full",
        "其设置中用于选择模块的表达式总长度过大（在“{pattern}”处）；请改用完整的模块名称重新保存该 LoRA",
    ),
    "lora.pattern_value": (
        "its settings give {module} an {entry} of {value}, which is no usable number; correct the settings",
        "其设置给 {module} 的 {entry} 为 {value}，不是可用的数值；请更正设置",
    ),
    "lora.pattern_flat": (
        "its settings are for single modules by their names with dots, and the file has {module}; save it again in the names "
        "of PEFT or diffusers",
        "其设置按带点的名称指定各个模块，而文件中写作 {module}；请用 PEFT 或 diffusers 的名称重新保存",
    ),
    "lora.settings_unknown": (
        "{count} of its settings are not understood and may change the result (first: {first}); update LoRA Guard, or compare "
        "with the program that made the file",
        "有 {count} 项设置无法识别，可能影响结果（首先是：{first}）；请更新 LoRA Guard，或与生成该文件的程序对比",
    ),
    "lora.other_kind": (
        "a {kind} adapter of {library}, a kind that cannot be applied here; merge it into its model with {library}, or train a "
        "LoRA",
        "这是 {library} 的 {kind} 适配器，此处无法应用；请用 {library} 将其合并到模型中，或改为训练 LoRA",
    ),
    "lora.variant": (
        "a {variant} of PEFT ({entry}), which needs more than its factors to be applied; merge it into its model with PEFT, or "
        "train a LoRA without {entry}",
        "这是 PEFT 的 {variant}（{entry}），仅凭其因子无法应用；请用 PEFT 将其合并到模型中，或在训练 LoRA 时不使用 {entry}",
    ),
    "lora.other_base": (
        "trained with init_lora_weights={start}, so it belongs to a changed model and not to the checkpoint; save it again "
        "with PEFT's save_pretrained(path_initial_model_for_weight_conversion=...), or merge it into its model with PEFT",
        "训练时使用了 init_lora_weights={start}，它属于被修改过的模型，而不是原始模型；请用 PEFT 的 "
        "save_pretrained（参数 path_initial_model_for_weight_conversion）重新保存，或用 PEFT 将其合并到模型中",
    ),
    "lora.alpha_stated": (
        "the metadata states alpha {alpha:g}, the tensors do not; it is used for {count} modules",
        "alpha {alpha:g} 只写在元数据中，张量中没有；已用于 {count} 个模块",
    ),
    "lora.alpha_alone": (
        "the metadata has {entry} = {value} without a rank, and {count} modules of rank {found} have no alpha; they are "
        "applied with alpha / rank = 1: compare the strength with the program that made the file",
        "元数据中有 {entry} = {value}，但没有对应的秩，而秩为 {found} 的 {count} 个模块没有 alpha；按 alpha / rank = 1 应用："
        "请与生成该文件的程序对比强度",
    ),
    "lora.config_too_long": (
        "the adapter_config.json beside it has {found_mb:.1f} MB and is not read, for at most {most_mb:.0f} MB are; its alpha is "
        "not known and 1 is used: replace it by the one that PEFT saved with the file",
        "旁边的 adapter_config.json 有 {found_mb:.1f} MB，超过可读取的 {most_mb:.0f} MB，因此未读取；无法得知 alpha，按 1 处理："
        "请换成 PEFT 随该文件保存的那一个",
    ),
    "lora.alpha_not_stated": (
        "{count} modules have no alpha, and that of the metadata is for rank {rank} while theirs is {found}; they are applied "
        "with alpha / rank = 1: compare the strength with the program that made the file",
        "有 {count} 个模块没有 alpha，而元数据中的 alpha 对应秩 {rank}，它们的秩为 {found}；按 alpha / rank = 1 应用，"
        "请与生成该文件的程序对比强度",
    ),
    "lora.embedding_dora": ("a DoRA on an embedding is not understood", "不支持嵌入层上的 DoRA"),
    "lora.lonely": (
        "belongs to no factors in the file, so it is not used; compare the strength with the program that made the file",
        "在文件中没有对应的因子，因此未使用；请与生成该文件的程序对比强度",
    ),
    "lora.two_spellings": (
        "{first} and {second} are one module in two spellings, with different values; the file is damaged",
        "{first} 与 {second} 是同一模块的两种写法，但数值不同；文件已损坏",
    ),
    "lora.unknown_field": (
        "{key} belongs to a module that is applied and is not understood, so the result would be wrong; update LoRA Guard, or "
        "merge the LoRA with the program that made it",
        "{key} 属于要应用的模块，但无法识别，结果会出错；请更新 LoRA Guard，或用生成该文件的程序合并此 LoRA",
    ),
    "lora.scalar_unused": (
        "{module}: a {kind} with a factor of its own ({value:g}), which is not understood; merge the LoRA with the program that "
        "made it",
        "{module}：带有单独系数（{value:g}）的 {kind}，无法识别；请用生成该文件的程序合并此 LoRA",
    ),
    "lora.difference_counts": (
        "is left out: the file has a whole {kind} of {module} beside it, which counts, as in the host",
        "未使用：文件中另有 {module} 的完整 {kind}，与宿主程序一样以后者为准",
    ),
    "lora.whole_weight": (
        "a whole weight beside the LoRA is not applied; merge it into the model with the program that made the file",
        "LoRA 旁边的完整权重未应用；请用生成该文件的程序将其合并到模型中",
    ),
    "lora.mostly_left_out": (
        "{left} of its {of} modules have no place in this model (first: {first}), too many to apply the rest; use a LoRA made "
        "for this model",
        "其 {of} 个模块中有 {left} 个在此模型中没有位置（首先是：{first}），数量过多，因此未应用；请使用适用于此模型的 LoRA",
    ),
    "report.left_out": (
        "{left} of {of} modules LEFT OUT (first: {first})",
        "{of} 个模块中有 {left} 个未应用（首先是：{first}）",
    ),
}
