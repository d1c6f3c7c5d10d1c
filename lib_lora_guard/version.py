"""The version, in a separate file so that it can be read from disk without an import."""

__version__ = "0.2.0"
