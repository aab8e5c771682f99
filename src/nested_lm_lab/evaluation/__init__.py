"""Result files: what they say, and how they are made."""
