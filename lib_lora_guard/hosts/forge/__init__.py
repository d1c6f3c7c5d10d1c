"""Stable Diffusion WebUI Forge as a host: its LoRA loader, its memory management, its layers."""
