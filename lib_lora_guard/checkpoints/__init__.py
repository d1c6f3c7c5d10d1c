"""Model files and LoRA files as their headers show them: for planning, inspecting and baking without reading weights."""
