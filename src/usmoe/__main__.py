"""`python -m usmoe`: the command line."""

from usmoe.cli import main

if __name__ == "__main__":
    main()
