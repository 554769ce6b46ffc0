"""``python -m ibaml.cli`` is ``ibaml``, for launchers of several processes."""

from ibaml.cli import main

if __name__ == "__main__":
    main()
