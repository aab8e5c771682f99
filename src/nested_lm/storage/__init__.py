"""Files that survive: atomic writes, locks, the commit a file was made at."""
