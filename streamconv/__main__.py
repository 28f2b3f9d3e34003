"""`python -m streamconv`."""

from streamconv.cli import main

if __name__ == "__main__":
    main()
