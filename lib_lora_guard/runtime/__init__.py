"""The guard at work inside a host, whichever it is. Imports no host; `host.py` is what a host provides."""
