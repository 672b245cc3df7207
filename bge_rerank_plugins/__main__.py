"""The `bge-rerank` command, also as `python -m bge_rerank_plugins`. Light to import: Ctrl-C is heard from the first moment."""

import sys


def main() -> int:
    """Runs the command; its exit status, 130 after Ctrl-C."""
    try:
        from .cli import main as run

        return run()
    except KeyboardInterrupt:  # before `cli` was there to hear it
        return 130


if __name__ == "__main__":
    sys.exit(main())
