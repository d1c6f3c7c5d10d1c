"""Strengths that change over the steps of an image."""

from __future__ import annotations

# English, Simplified Chinese.
TEXTS: dict[str, tuple[str, str]] = {
    "schedules.malformed": (
        "its strength '{text}' is neither a number nor a schedule such as 0@0,1@0.5,0@1",
        "强度“{text}”既不是数字，也不是 0@0,1@0.5,0@1 这样的强度变化写法",
    ),
    "schedules.list": (
        "its strength '{text}' is a list of {count} numbers without steps, and block weights are not read; write one number with a point, such as 0.8, or a schedule such as 0@0,1@0.5",
        "强度“{text}”是 {count} 个没有步数的数字，且不支持分层权重；请写一个带小数点的数字，如 0.8，或写 0@0,1@0.5 这样的强度变化",
    ),
    "schedules.fourth_word": (
        "its fourth word '{text}' is read as the rank of a DyLoRA, which is a whole number; leave that word out",
        "第四项“{text}”会被当作 DyLoRA 的秩，必须是整数；请去掉这一项",
    ),
    "schedules.rank": (
        "its dyn '{text}' is not a whole number; leave it out, or write one such as dyn=8",
        "dyn“{text}”不是整数；请去掉，或写整数，如 dyn=8",
    ),
    "schedules.no_name": (
        "the tag has no name; write the name of a LoRA first, and rename a file that has = in its name",
        "标签中没有名称；请先写 LoRA 的名称，文件名中有 = 时请重命名文件",
    ),
    "schedules.left_out": (
        "{name} NOT applied: {why}; correct it in the prompt: {tag} (LG-L03)",
        "{name} 未应用：{why}；请在提示词中改正：{tag}（LG-L03）",
    ),
    "schedules.same_twice": (
        "{name} stands {count} times in the prompt with strength {strength:g} for the {side}, and counts once, as in Forge itself; for more write it once, with the sum of the strengths (LG-L04)",
        "{name} 在提示词中以强度 {strength:g}（用于{side}）出现 {count} 次，但只计一次，与 Forge 本身相同；要叠加请只写一次，强度写总和（LG-L04）",
    ),
    "schedules.follows": (
        "strengths follow the prompt over {steps} steps: {loras}. The prompt is encoded once, so the text encoder keeps the first strength",
        "强度将在 {steps} 步中按提示词变化：{loras}。提示词只编码一次，因此文本编码器始终使用起始强度",
    ),
    "schedules.whole_refresh": (
        "strengths could not be changed in place; all LoRAs are applied again in each step, which is slower",
        "无法就地修改强度；每一步都会重新应用全部 LoRA，速度会变慢",
    ),
}
