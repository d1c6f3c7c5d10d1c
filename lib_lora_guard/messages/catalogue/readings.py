"""Sources of memory numbers, and reasons for missing ones."""

from __future__ import annotations

# English, Simplified Chinese.
TEXTS: dict[str, tuple[str, str]] = {
    # Sources.
    "readings.driver": ("graphics driver, through torch", "显卡驱动（通过 torch 查询）"),
    "readings.torch": ("torch's CUDA allocator", "torch 的 CUDA 显存分配器"),
    "readings.pinned": ("torch's allocator of pinned memory", "torch 的锁页内存分配器"),
    "readings.nvml": ("NVIDIA's management library (NVML)", "NVIDIA 管理库（NVML）"),
    "readings.system": ("operating system", "操作系统"),
    "readings.windows": ("Windows", "Windows 系统"),
    "readings.groups": ("control groups around this process", "本进程所在的控制组（cgroup）"),
    "readings.computed": ("computed from the other numbers", "由其他数值计算得出"),
    # Reasons for a missing number.
    "readings.not_cuda": (
        "images are made on {device}; only CUDA and ROCm cards tell how much memory is free",
        "图片在 {device} 上生成；只有 CUDA 和 ROCm 显卡能报告剩余显存",
    ),
    "readings.cuda_not_started": (
        "CUDA has not been started yet, and asking would start it",
        "CUDA 尚未启动，而查询会将其启动",
    ),
    "readings.driver_refused": ("the graphics driver refused to say ({error})", "显卡驱动拒绝回答（{error}）"),
    "readings.not_counted": ("nothing counts it here", "此处没有对其进行统计"),
    "readings.no_group": ("no control group limits this process", "没有控制组（cgroup）限制本进程"),
    "readings.not_windows": ("only Windows has this number", "只有 Windows 才有这个数值"),
    "readings.windows_refused": ("Windows refused to say ({error})", "Windows 拒绝回答（{error}）"),
    "readings.card_unknown": (
        "which card it is cannot be told ({error})",
        "无法确定是哪一块显卡（{error}）",
    ),
    "readings.nvml_not_asked": ("NVML was not asked", "未查询 NVML"),
    "readings.nvml_absent": (
        "NVML is not there; it comes with NVIDIA's driver",
        "未找到 NVML；它随 NVIDIA 驱动一同安装",
    ),
    "readings.nvml_closed": ("NVML is no longer asked", "已停止查询 NVML"),
    "readings.nvml_function": (
        "the NVIDIA driver is too old: its NVML lacks {function}",
        "NVIDIA 驱动版本过旧：其 NVML 缺少 {function}",
    ),
    "readings.nvml_refused": (
        "NVML refused to say ({function}: error {code})",
        "NVML 拒绝回答（{function}：错误 {code}）",
    ),
    "readings.nvml_not_supported": ("this card does not tell NVML", "此显卡不向 NVML 提供该数值"),
    "readings.nvml_no_permission": (
        "this user may not ask NVML",
        "当前用户没有查询 NVML 的权限",
    ),
    "readings.nvml_not_found": ("NVML does not know this card", "NVML 中没有这块显卡"),
    "readings.nvml_no_driver": ("NVIDIA's driver is not loaded", "NVIDIA 驱动未加载"),
    "readings.nvml_card_lost": (
        "the card no longer answers; restart the machine",
        "显卡已无响应；请重启电脑",
    ),
    "readings.nvml_blocked": (
        "the operating system keeps the card from NVML",
        "操作系统阻止 NVML 访问此显卡",
    ),
    "readings.nvml_driver_changed": (
        "NVIDIA's driver was updated while it ran; restart the machine",
        "NVIDIA 驱动在运行期间被更新；请重启电脑",
    ),
    "readings.nvml_hidden": (
        "the driver does not tell it per program, as always on Windows",
        "驱动不按程序报告该数值，在 Windows 上一向如此",
    ),
    "readings.nvml_not_listed": (
        "NVML does not list this process",
        "NVML 的列表中没有本进程",
    ),
    "readings.nvml_other_pids": (
        "this process runs in a container, whose process numbers are not the driver's",
        "本进程在容器中运行，容器内的进程号与驱动的不同",
    ),
}
