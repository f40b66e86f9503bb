"""`python -m workpool` runs the `workpool` command."""

from workpool.cli import main

if __name__ == "__main__":
    main()
