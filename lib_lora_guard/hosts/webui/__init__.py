"""The common parts of the hosts of the A1111 family: prompts, LoRA tags, settings, the tab. Imports no host."""
