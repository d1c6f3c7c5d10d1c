"""Recomputes the configurations that users reported. A check of the plan and the source of a document; unused in Forge."""
