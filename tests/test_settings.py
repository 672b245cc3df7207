"""Options: one definition, clear refusals, secrets kept."""

import inspect
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import DATA
from pydantic import ValidationError

from bge_rerank_plugins import RerankSettings, Scorer
from bge_rerank_plugins.evaluation.settings import EvaluationSettings
from bge_rerank_plugins.finetune import FinetuneSettings, MineSettings
from bge_rerank_plugins.models import EMBEDDED_LLMS
from bge_rerank_plugins.settings import EMBEDDED


def test_the_scorer_takes_every_option_with_its_default() -> None:
    parameters = inspect.signature(Scorer.__init__).parameters
    fields = RerankSettings.model_fields
    assert list(parameters)[1:] == list(fields)
    assert {name: p.default for name, p in parameters.items() if name not in ("self", "model")} == {
        name: field.default for name, field in fields.items() if name != "model"
    }
    assert all(p.kind == p.KEYWORD_ONLY for name, p in parameters.items() if name not in ("self", "model"))


def test_every_option_is_documented() -> None:
    assert all(field.description for field in RerankSettings.model_fields.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "gpu"}, "device='gpu': not one of cpu, cuda, mps"),
        ({"device": ["cpu", "tpu"]}, "device='tpu'"),
        ({"device": []}, r"device=\[\]"),
        ({"dtype": "int4"}, "'int4'.*|'auto', 'fast', 'float32', 'bfloat16' or 'float16'"),
        ({"max_length": 0}, "max_length"),
        ({"max_length": -5}, "max_length"),
        ({"max_length": True}, "max_length=True: expected a whole number"),
        ({"max_batch_tokens": False}, "max_batch_tokens=False: expected a whole number"),
        ({"query_max_length": 20, "max_length": 10}, "query_max_length=20: longer than the whole pair, max_length=10"),
        ({"cutoff_layer": 0}, "cutoff_layer"),
        ({"max_batch_tokens": 0}, "max_batch_tokens"),
        ({"model": ""}, "model"),
        ({"model": None}, "model"),
        ({"normalize": "maybe"}, "normalize"),
    ],
)
def test_an_impossible_option_is_refused_by_name(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Scorer(**({"model": "m"} | options))  # type: ignore[arg-type]


def test_a_path_in_the_home_directory_is_written_in_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was no directory, and "~" no hub id either."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))  # on Windows
    shutil.copytree(DATA / "encoder", tmp_path / "model")
    settings = RerankSettings(model="~/model", peft_path=Path("~/adapter"), cache_dir="~")
    assert [settings.model, settings.peft_path, settings.cache_dir] == [
        str(tmp_path / "model"),
        str(tmp_path / "adapter"),
        str(tmp_path),
    ]
    with Scorer("~/model") as scorer:
        assert len(scorer.score("a", ["b"])) == 1


def test_a_directory_is_the_one_that_its_name_meant_when_it_was_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a change of directory another checkpoint was loaded under the same name, or one that was loaded served for it."""
    for place in ("first", "second"):
        shutil.copytree(DATA / "encoder", tmp_path / place / "model")
    shutil.copytree(DATA / "encoder", tmp_path / "second" / "embedded")
    monkeypatch.chdir(tmp_path / "first")
    names = ("model", Path("model"), "./model", str(tmp_path / "first" / "model"))
    found = [RerankSettings(model=name, peft_path=name) for name in names]
    assert {(each.model, each.peft_path) for each in found} == {(str(tmp_path / "first" / "model"),) * 2}
    with Scorer("model") as lazy:
        monkeypatch.chdir(tmp_path / "second")
        with Scorer("model") as other:
            assert lazy.settings.model == str(tmp_path / "first" / "model") != other.settings.model
            shutil.rmtree("model")
            assert len(lazy.score("a", ["b"])) == 1
            with pytest.raises(ValueError, match="no such directory"):
                other.score("a", ["b"])
    for name in ("embedded", "BAAI/bge-reranker-base", "./is/not/there"):
        assert RerankSettings(model=name).model == name


def test_the_names_of_the_demo_models_are_known_here() -> None:
    assert {*EMBEDDED} == {"embedded", *EMBEDDED_LLMS}


@pytest.mark.parametrize("option", ["query_instruction", "prompt", "model", "peft_path"])
def test_text_that_is_no_unicode_is_refused_by_name(option: str) -> None:
    """It ended in an error of what writes JSON, which named nothing."""
    options: dict[str, Any] = {"model": "m", option: "\udcff list"}
    with pytest.raises(ValueError, match=rf"{option}='\\udcff list': not valid Unicode"):
        RerankSettings(**options)


def test_an_unknown_option_is_refused() -> None:
    with pytest.raises(ValidationError, match="use_fp16"):
        RerankSettings(model="m", use_fp16=True)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="use_fp16"):
        Scorer("m", use_fp16=True)  # type: ignore[call-arg]


def test_the_token_is_never_shown_or_serialised() -> None:
    settings = RerankSettings(model="m", token="secret")
    assert settings.token == "secret"
    assert "secret" not in repr(settings) + repr(Scorer("m", token="secret")) + str(settings)
    assert "token" not in settings.model_dump()
    assert "secret" not in settings.model_dump_json()
    with pytest.raises(ValidationError, match="model") as refused:
        RerankSettings(token="secret")  # type: ignore[call-arg]
    assert "secret" not in str(refused.value)
    assert pickle.loads(pickle.dumps(settings)).token == "secret"
    with pytest.raises(ValidationError, match="output_dir") as refused:
        FinetuneSettings(token="secret")  # type: ignore[call-arg]
    assert "secret" not in str(refused.value)
    assert FinetuneSettings(model="m", data="d", output_dir="o", token="secret").token == "secret"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: FinetuneSettings(model="m", data="d", output_dir="o", lora_rank=True),
            "lora_rank=True: expected a whole",
        ),
        (
            lambda: FinetuneSettings(model="m", data="d", output_dir="o", held_out=False),
            "held_out=False: expected a number",
        ),
        (lambda: MineSettings(first=True), "first=True: expected a whole number"),
        (lambda: EvaluationSettings(data="d", top_k=True), "top_k=True: expected a whole number"),
    ],
)
def test_a_truth_value_is_no_number_anywhere(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        make()


def test_settings_make_the_same_scorer() -> None:
    settings = RerankSettings(model="m", device=["cpu", "cpu"], max_length=99, normalize=True, token="t")
    scorer = Scorer.from_settings(settings)
    assert scorer.settings == settings
    assert scorer.has_settings_of(settings)
    assert not scorer.has_settings_of(settings.model_copy(update={"max_length": 98}))


def test_changing_what_a_scorer_shows_of_its_settings_does_not_change_the_scorer() -> None:
    scorer = Scorer("m")
    scorer.settings.normalize = True
    assert scorer.settings.normalize is False


def test_an_assignment_that_is_refused_leaves_the_old_value() -> None:
    settings = RerankSettings(model="m", max_length=200, query_max_length=100)
    with pytest.raises(ValidationError, match="query_max_length=100: longer"):
        settings.max_length = 10
    with pytest.raises(ValidationError, match="query_max_length=300: longer"):
        settings.query_max_length = 300
    assert (settings.max_length, settings.query_max_length) == (200, 100)


def test_paths_are_taken_as_text() -> None:
    from pathlib import Path

    settings = RerankSettings(model=Path("a/b"), peft_path=Path("c"), cache_dir=Path("d"))  # type: ignore[arg-type]
    assert (settings.model, settings.peft_path, settings.cache_dir) == ("a/b", "c", "d")
