"""Start in a program that LoRA Guard does not support: which one it seems to be, and what its user can do."""

from __future__ import annotations

# English, Simplified Chinese.
TEXTS: dict[str, tuple[str, str]] = {
    "other_hosts.why": (
        "{probe}. This seems to be {program}: {advice}",
        "{probe}。当前程序似乎是 {program}：{advice}",
    ),
    "other_hosts.a1111": ("AUTOMATIC1111's WebUI", "AUTOMATIC1111 WebUI"),
    "other_hosts.a1111.do": (
        "LoRAs work as always here; LoRA Guard works in Forge, so it can be disabled in this program",
        "此处的 LoRA 照常可用；LoRA Guard 仅用于 Forge，可在本程序中将其禁用",
    ),
    "other_hosts.old_forge": ("Forge from before August 2024", "2024 年 8 月之前的 Forge"),
    "other_hosts.old_forge.do": (
        "LoRAs work as always; update Forge (git pull) to use LoRA Guard",
        "LoRA 照常可用；如需使用 LoRA Guard，请更新 Forge（git pull）",
    ),
    "other_hosts.classic": ("Forge Classic", "Forge Classic"),
    "other_hosts.classic.do": (
        "LoRAs work as always here; LoRA Guard works in Forge, so it can be disabled in this program",
        "此处的 LoRA 照常可用；LoRA Guard 仅用于 Forge，可在本程序中将其禁用",
    ),
    "other_hosts.reforge": ("reForge", "reForge"),
    "other_hosts.reforge.do": (
        "LoRAs work as always here; LoRA Guard works in Forge and in reForge's branch newmain_newforge",
        "此处的 LoRA 照常可用；LoRA Guard 可用于 Forge 以及 reForge 的 newmain_newforge 分支",
    ),
    "other_hosts.neo": ("Forge Neo", "Forge Neo"),
    "other_hosts.neo.do": (
        "LoRAs work as always here; update Forge Neo (git pull): LoRA Guard works in one of August 2026, and in a Forge Neo that still has Forge's LoRA patcher",
        "此处的 LoRA 照常可用；请更新 Forge Neo（git pull）：LoRA Guard 可用于 2026 年 8 月的版本，以及仍保留 Forge LoRA 补丁功能的 Forge Neo",
    ),
    "other_hosts.forge": ("Forge or a relative of it", "Forge 或其衍生版本"),
    "other_hosts.forge.do": (
        "LoRAs work as always; update the program (git pull), and if this line stays, report it to LoRA Guard",
        "LoRA 照常可用；请更新程序（git pull），若仍出现此提示，请向 LoRA Guard 反馈",
    ),
    "other_hosts.broken.do": (
        "a part of it cannot be imported, which it needs itself; once it starts without this error, so does LoRA Guard",
        "其自身所需的一个模块无法导入；待程序本身不再出现此错误后，LoRA Guard 即可启动",
    ),
    "other_hosts.comfyui": ("ComfyUI", "ComfyUI"),
    "other_hosts.comfyui.do": (
        "LoRAs work as always here; LoRA Guard works in Forge",
        "此处的 LoRA 照常可用；LoRA Guard 仅用于 Forge",
    ),
    "other_hosts.unknown": ("no program that LoRA Guard knows", "LoRA Guard 不认识的程序"),
    "other_hosts.unknown.do": (
        "LoRA Guard works in Forge; outside a WebUI use lib_lora_guard.hosts.plain.guard",
        "LoRA Guard 用于 Forge；在 WebUI 之外请使用 lib_lora_guard.hosts.plain.guard",
    ),
}
