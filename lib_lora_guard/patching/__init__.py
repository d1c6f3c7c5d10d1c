"""Applies LoRAs to a model and takes them off again: engine, attachments, backups, transaction. Knows no host."""
