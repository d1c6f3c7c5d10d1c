"""Stable Diffusion WebUI Forge Neo as a host: its patchers, its memory management, its layers."""
