"""Records the running operation in a file that survives a killed process, so that the next start can explain the crash."""
