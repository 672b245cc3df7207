"""Checkpoints that cannot be used are refused with the reason; none is scored wrongly in silence."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from bge_rerank_plugins import Scorer


@pytest.fixture
def copied(encoder_dir: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(encoder_dir, tmp_path / "model"))


def refused(model: object) -> str:
    with pytest.raises(ValueError, match="model=") as caught:
        Scorer(str(model)).score("a", ["b"])
    assert repr(str(model)) in str(caught.value)
    return str(caught.value)


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    assert "no such directory" in refused(tmp_path / "nothing")


def test_a_hub_id_that_cannot_be_had_offline() -> None:
    assert "cannot be read" in refused("nobody/no-such-model")


def test_a_directory_without_a_config(tmp_path: Path) -> None:
    assert "no config.json" in refused(tmp_path)


def test_a_config_that_is_not_json(copied: Path) -> None:
    (copied / "config.json").write_text("{")
    assert "cannot be read" in refused(copied)


def test_an_unknown_architecture_lists_those_that_are_supported(copied: Path) -> None:
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | {"architectures": ["T5ForConditionalGeneration"]}))
    message = refused(copied)
    assert "T5ForConditionalGeneration, which is not supported" in message
    assert "XLMRobertaForSequenceClassification" in message


def test_a_config_that_names_no_architecture(copied: Path) -> None:
    config = json.loads((copied / "config.json").read_text())
    del config["architectures"]
    (copied / "config.json").write_text(json.dumps(config))
    assert "not supported" in refused(copied)


def test_weights_that_are_not_there(copied: Path) -> None:
    (copied / "model.safetensors").unlink()
    assert "weights cannot be loaded" in refused(copied)


def test_a_pickle_is_never_opened(copied: Path) -> None:
    """A pickle runs code when it is read."""
    (copied / "model.safetensors").unlink()
    torch.save({}, copied / "pytorch_model.bin")
    assert "weights cannot be loaded" in refused(copied)


def test_weights_cut_short(copied: Path) -> None:
    weights = (copied / "model.safetensors").read_bytes()
    (copied / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    assert "weights cannot be loaded" in refused(copied)


def test_a_tokenizer_that_is_not_there(copied: Path) -> None:
    (copied / "tokenizer.json").unlink()
    assert "tokenizer" in refused(copied)


def test_a_tokenizer_that_cannot_be_read(copied: Path) -> None:
    (copied / "tokenizer.json").write_text("{")
    assert "tokenizer cannot be loaded" in refused(copied)


def test_an_adapter_that_is_not_there(encoder_dir: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"peft_path=.*no LoRA adapter"):
        Scorer(encoder_dir, peft_path=str(tmp_path)).score("a", ["b"])


def test_a_load_that_failed_is_tried_again(copied: Path) -> None:
    """A download that broke off must not spoil the scorer for good."""
    scorer = Scorer(str(copied))
    (copied / "config.json").rename(copied / "elsewhere.json")
    with pytest.raises(ValueError, match=r"config\.json"):
        scorer.score("a", ["b"])
    (copied / "elsewhere.json").rename(copied / "config.json")
    assert len(scorer.score("a", ["b"])) == 1
    scorer.close()


def test_loading_prints_nothing(encoder_dir: str, capfd: pytest.CaptureFixture[str]) -> None:
    with Scorer(encoder_dir, query_instruction="unlike any other scorer's ") as scorer:
        scorer.score("a", ["b"])
    assert capfd.readouterr() == ("", "")


def test_models_may_be_loaded_at_the_same_time() -> None:
    """Transformers is not safe for that: it replaces methods of its classes while it loads."""
    from concurrent.futures import ThreadPoolExecutor

    from conftest import DATA
    from transformers import PreTrainedModel

    before = PreTrainedModel.tie_weights

    def load(number: int) -> int:
        directory = str(DATA / ("encoder", "decoder", "layerwise")[number % 3])
        with Scorer(directory, query_instruction=f"{number} ") as scorer:
            return len(scorer.score("a", ["b"]))

    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(load, range(48))) == [1] * 48
    assert PreTrainedModel.tie_weights is before
