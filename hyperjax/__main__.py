"""``python -m hyperjax``: the same as the command ``hyperjax``."""

from hyperjax.cli import main

if __name__ == "__main__":
    main()
