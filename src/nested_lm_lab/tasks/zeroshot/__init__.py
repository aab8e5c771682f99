"""Zero-shot tasks of the LM Evaluation Harness: its prompts and metrics over models with explicit stream states."""
