"""A model's files, in a directory or from the hub, and the commit that they are of there. Without torch or transformers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..settings import RerankSettings

_COMMIT = "[0-9a-f]{40}"


def commit_of(file: Path) -> str | None:
    """The commit of a file in the hub's cache, which has it in `snapshots/COMMIT`; None for one that lies elsewhere."""
    found = re.search(f"/snapshots/({_COMMIT})/", file.as_posix())
    return None if found is None else found[1]


def needed_file(settings: RerankSettings, name: str) -> Path:
    """Local path of a file that the model must have.

    Raises:
        ValueError: It has none, or it cannot be had.
    """
    file = model_file(settings, name)
    if file is None:
        raise ValueError(f"model={settings.model!r}: it has no {name}")
    return file


def model_file(settings: RerankSettings, name: str) -> Path | None:
    """Local path of a file of a model, downloaded if need be; None if the model has no such file.

    Raises:
        ValueError: There is no such model, or the hub cannot be asked.
    """
    local = Path(settings.model)
    if local.is_dir():
        return local / name if (local / name).is_file() else None
    if local.is_absolute() or settings.model.startswith((".", "~")):
        raise ValueError(f"model={settings.model!r}: no such directory")
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

    if _is_commit(settings.revision):
        known = try_to_load_from_cache(settings.model, name, cache_dir=settings.cache_dir, revision=settings.revision)
        if known is not None:
            return Path(known) if isinstance(known, str) else None  # no path: known to be missing
    try:
        return Path(
            hf_hub_download(
                settings.model,
                name,
                revision=settings.revision,
                cache_dir=settings.cache_dir,
                local_files_only=settings.local_files_only,
                token=settings.token,
            )
        )
    except EntryNotFoundError:
        return None
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise ValueError(f"model={settings.model!r}: {name} cannot be had: {error}") from error


def _is_commit(revision: str | None) -> bool:
    """Whether a revision can never mean other files: a commit, and no branch or tag."""
    return re.fullmatch(_COMMIT, revision or "") is not None
