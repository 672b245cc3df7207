"""Which commit of a hub's repository files are of. Knows nothing of models, and imports nothing that takes long."""

import re
from pathlib import Path

_COMMIT = "[0-9a-f]{40}"


def commit_of(file: Path) -> str | None:
    """The commit of a file in the hub's cache, which has it in `snapshots/COMMIT`; None for one that lies elsewhere."""
    found = re.search(f"/snapshots/({_COMMIT})/", file.as_posix())
    return None if found is None else found[1]


def is_commit(revision: str | None) -> bool:
    """Whether a revision can never mean other files: a commit, and no branch or tag."""
    return re.fullmatch(_COMMIT, revision or "") is not None
