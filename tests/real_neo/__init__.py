"""The extension in a running Forge Neo: scripts that are run by hand. docs/hosts.md says what they need."""
