"""End to end: the extension in a running Forge, over its API. See docs/hosts.md for what it needs."""
