"""Streams that outlive a process: memory files, reading documents into them, scoring documents with them."""
