"""A model's files, in a directory or from the hub, and the commit that they are of there. Without torch or transformers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..settings import RerankSettings
    from .checkpoint import Checkpoint

_COMMIT = "[0-9a-f]{40}"


def commit_of(file: Path) -> str | None:
    """The commit of a file in the hub's cache, which has it in `snapshots/COMMIT`; None for one that lies elsewhere."""
    found = re.search(f".*/snapshots/({_COMMIT})/", file.as_posix())  # the last one: the cache may lie in another's
    return None if found is None else found[1]


def needed_file(place: RerankSettings | Checkpoint, name: str) -> Path:
    """Local path of a file that the model must have.

    Raises:
        ValueError: It has none, or it cannot be had.
    """
    file = model_file(place, name)
    if file is None:
        at = "" if Path(place.model).is_dir() else " at the hub, or none in its cache where that cannot be asked"
        raise ValueError(f"model={place.model!r}: it has no {name}{at}")
    return file


def model_file(place: RerankSettings | Checkpoint, name: str) -> Path | None:
    """Local path of a file of a model, downloaded if need be.

    Returns:
        None if the model has no such file; also if the hub's cache has none, and there is no way to the hub.

    Raises:
        ValueError: There is no such model, or the hub failed to give the file.
    """
    local = Path(place.model)
    if local.is_dir():
        return local / name if (local / name).is_file() else None
    if local.is_absolute() or place.model.startswith((".", "~")):
        raise ValueError(f"model={place.model!r}: no such directory")
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    if _is_commit(place.revision):
        known = try_to_load_from_cache(place.model, name, cache_dir=place.cache_dir, revision=place.revision)
        if known is not None:
            return Path(known) if isinstance(known, str) else None  # no path: known to be missing
    try:
        return Path(
            hf_hub_download(
                place.model,
                name,
                revision=place.revision,
                cache_dir=place.cache_dir,
                local_files_only=place.local_files_only,
                token=place.token,
            )
        )
    except Exception as error:  # an HTTP library's own among them
        if isinstance(error, LocalEntryNotFoundError):
            failed = isinstance(error.__cause__, HfHubHTTPError) and _gives_others(place)
        else:
            failed = not isinstance(error, EntryNotFoundError)
        if failed:
            raise ValueError(f"model={place.model!r}: {name} cannot be had: {error}") from error
        return None


def _gives_others(place: RerankSettings | Checkpoint) -> bool:
    """Whether the hub fails for one file alone. It may be down, or behind what refuses all: then the cache is all there is."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError

    try:
        get_hf_file_metadata(hf_hub_url(place.model, "config.json", revision=place.revision), token=place.token)
    except EntryNotFoundError:
        return True
    except Exception:
        return False
    return True


def _is_commit(revision: str | None) -> bool:
    """Whether a revision can never mean other files: a commit, and no branch or tag."""
    return re.fullmatch(_COMMIT, revision or "") is not None
