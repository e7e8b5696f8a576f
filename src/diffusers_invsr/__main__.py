"""`python -m diffusers_invsr`: the command line, if its script is not on the path."""

from .cli import main


if __name__ == "__main__":
    main()
