"""Lets `python -m nested_lm` stand for the `nested-lm` command."""

from nested_lm.cli.main import main

if __name__ == "__main__":
    main()
