"""``python -m engine`` is ``woolmill``."""

from engine.cli.main import main

if __name__ == "__main__":
    main()
