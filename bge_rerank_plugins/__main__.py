"""`python -m bge_rerank_plugins`: the `bge-rerank` command."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
