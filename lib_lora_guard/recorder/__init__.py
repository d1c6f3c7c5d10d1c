"""What the process is doing, kept in a file that survives it: so that the next start can say what a killed one died of."""
