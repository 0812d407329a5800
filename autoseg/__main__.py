"""`python -m autoseg ...`, which torchrun needs; the same as the `autoseg` command."""

from autoseg.cli.main import main

if __name__ == "__main__":
    main()
