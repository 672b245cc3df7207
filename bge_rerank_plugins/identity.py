"""What tells a scorer's results from another's, so that kept ones are not taken for its own. Knows nothing of torch."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from .settings import RerankSettings

_NOT_ASKED = frozenset({"show_progress", "token", "cache_dir", "local_files_only", "max_queued_tokens", "when_full"})
"""Options that change neither scores nor time."""

_LOADED = (".json", ".safetensors", ".txt", ".model", ".bin")
"""Endings of a checkpoint's files that scores depend on: config, weights, which an old adapter has as .bin, and
the tokenizer in any of its forms."""


def asked_options(settings: RerankSettings) -> dict[str, Any]:
    """The options that scores or time depend on."""
    return settings.model_dump(exclude=set(_NOT_ASKED))


def local_files(settings: RerankSettings) -> list[tuple[str, int, int]]:
    """Name, size and time of a local checkpoint's files, and of a local adapter's: it may be trained again in its place."""
    files: list[tuple[str, int, int]] = []
    for place in (settings.model, settings.peft_path):
        if place is not None and Path(place).is_dir():
            paths = sorted(path for path in Path(place).iterdir() if path.suffix in _LOADED and path.is_file())
            files += [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    return files


def digest(*asked: Any) -> str:
    """A short name of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:32]
