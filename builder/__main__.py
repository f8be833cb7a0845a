"""`python -m builder` is the console script."""

from builder.cli import main

if __name__ == "__main__":  # worker processes import this module anew
    main()
