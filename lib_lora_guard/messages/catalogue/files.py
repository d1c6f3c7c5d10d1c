"""Reasons why a file cannot be read. "about.one" puts the file's name before them."""

from __future__ import annotations

# English, Simplified Chinese.
TEXTS: dict[str, tuple[str, str]] = {
    "file.missing": (
        "no such file; check its name and folder, or refresh the list",
        "文件不存在；请检查文件名与所在文件夹，或刷新列表",
    ),
    "file.missing_unlisted": (
        "no such file; check its name and folder",
        "文件不存在；请检查文件名与所在文件夹",
    ),
    "file.missing_near": (
        "no such file; is {near} meant?",
        "文件不存在；是否指 {near}？",
    ),
    "file.folder": (
        "this is a folder; give a file in it{example}",
        "这是一个文件夹；请指定其中的文件{example}",
    ),
    "file.folder_example": (", such as {name}", "，例如 {name}"),
    "file.unreadable": (
        "cannot be read ({error}); check the disk and who may read it",
        "无法读取（{error}）；请检查磁盘以及读取权限",
    ),
    "file.not_a_model": (
        "expected a safetensors or GGUF file, {found}",
        "应为 safetensors 或 GGUF 文件，{found}",
    ),
    "file.empty": ("found an empty one; download it again", "但该文件是空的；请重新下载"),
    "file.zip": (
        "found a zip archive, as .pt, .ckpt and .bin files are; convert it to safetensors (for example with the Checkpoint "
        "Merger tab, or safetensors.torch.save_file), it can carry code that runs on loading",
        "但该文件是 zip 压缩包（.pt、.ckpt、.bin 文件都是这种格式），加载时可能执行其中夹带的代码；"
        "请先转换为 safetensors（例如用“模型合并”选项卡，或 safetensors.torch.save_file）",
    ),
    "file.pickle": (
        "found a pickle, as .pt, .ckpt and .pth files are; convert it to safetensors (for example with the Checkpoint "
        "Merger tab, or safetensors.torch.save_file), it can carry code that runs on loading",
        "但该文件是 pickle（.pt、.ckpt、.pth 文件都是这种格式），加载时可能执行其中夹带的代码；"
        "请先转换为 safetensors（例如用“模型合并”选项卡，或 safetensors.torch.save_file）",
    ),
    "file.lfs": (
        "found the short text that Git LFS keeps in place of a file; run 'git lfs pull' or download it",
        "但该文件只是 Git LFS 的占位文本；请运行 git lfs pull，或单独下载该文件",
    ),
    "file.web_page": (
        "found a web page, saved in place of the file; download it again, logged in where the site asks for it",
        "但该文件是一个网页（下载时保存了网页而不是文件）；请重新下载，如网站要求请先登录",
    ),
    "file.unknown": (
        "found one that starts with {start}; check that it is a model, or download it again",
        "但该文件以 {start} 开头；请确认它是模型文件，或重新下载",
    ),
    "file.damaged": (
        "{detail}; the file is damaged, download it again",
        "文件已损坏，请重新下载（{detail}）",
    ),
    "file.too_short": (
        "expected {wanted} bytes, found {found}; the file is not complete or damaged, download it again",
        "应有 {wanted} 字节，实际为 {found} 字节；文件不完整或已损坏，请重新下载",
    ),
    "file.at_least_too_short": (
        "expected at least {wanted} bytes, found {found}; the file is not complete or damaged, download it again",
        "至少应有 {wanted} 字节，实际为 {found} 字节；文件不完整或已损坏，请重新下载",
    ),
    "file.header_incomplete": (
        "expected a header of {wanted} bytes, found {found}; the file is not complete, download it again",
        "文件头应有 {wanted} 字节，实际为 {found} 字节；文件不完整，请重新下载",
    ),
    "file.header_at_least": ("at least {count}", "至少 {count}"),
    "file.header_too_long": (
        "expected a header of at most {most} bytes, found {found}; not a safetensors file or damaged, download it again",
        "文件头最多 {most} 字节，实际为 {found} 字节；这不是 safetensors 文件，或文件已损坏，请重新下载",
    ),
    "file.header_cut": (
        "expected a header of {wanted} bytes, found {found}; load it again",
        "文件头应有 {wanted} 字节，实际为 {found} 字节；请重新加载",
    ),
    "file.cut_short": (
        "expected {wanted} bytes, found {found}; the file was cut short while it was read, load it again",
        "应有 {wanted} 字节，实际为 {found} 字节；文件在读取过程中被截断，请重新加载",
    ),
    "file.cut_in_header": (
        "was cut short while its header was read; wait until the file is written",
        "在读取文件头时被截断；请等待文件写入完成",
    ),
    "file.resized": (
        "expected {wanted} bytes as when its header was read, found {found}; wait until the file is written, then load it again",
        "读取文件头时为 {wanted} 字节，现在为 {found} 字节；请等待文件写入完成后重新加载",
    ),
    "file.rewritten": (
        "was written to since its header was read; wait until the file is written, then load it again",
        "在读取文件头之后又被写入；请等待文件写入完成后重新加载",
    ),
    "file.no_tensor": (
        "no such tensor in this file; check that it is the file you meant",
        "文件中没有这个张量；请确认这是您要用的文件",
    ),
    "file.dtype": (
        "stored as {format}, which torch {torch} does not have; get the file in F16 or BF16, or convert it",
        "存储格式为 {format}，torch {torch} 不支持；请获取 F16 或 BF16 格式的文件，或自行转换",
    ),
    "file.keeps_changing": (
        "it was written to each of the {count} times it was read; wait until the file is written, then load it again",
        "读取了 {count} 次，每次读取期间文件都被写入；请等待文件写入完成后重新加载",
    ),
    "file.no_memory": (
        "reading it needs {needed_mb:.0f} MB of RAM, and the system gives no more; close other programs, or use a smaller file",
        "读取需要 {needed_mb:.0f} MB 内存，而系统无法再提供；请关闭其他程序，或使用更小的文件",
    ),
    "file.too_many_tensors": (
        "expected at most {most} tensors, found more: a LoRA has some thousand; choose another file",
        "最多应有 {most} 个张量，实际更多：LoRA 一般只有几千个；请选择其他文件",
    ),
    "file.table_too_long": (
        "expected names and shapes of at most {most} characters together, found more: those of a LoRA take up to a million; choose "
        "another file",
        "张量名称与形状的总长度最多应为 {most} 个字符，实际更长：LoRA 一般不超过一百万；请选择其他文件",
    ),
}
