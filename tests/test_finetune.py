"""Fine-tuning from the command line to a model that `Scorer` loads, for all three families."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DATA
from finetune_data import accuracy, toy_lines, write_lines

from bge_rerank_plugins import Scorer
from bge_rerank_plugins.cli import main
from bge_rerank_plugins.core.decoder import Decoder
from bge_rerank_plugins.finetune import FinetuneSettings, finetune
from bge_rerank_plugins.finetune.batches import Collator
from bge_rerank_plugins.finetune.data import Group
from bge_rerank_plugins.finetune.models import trainee_of
from bge_rerank_plugins.finetune.trainer import newest_checkpoint

FAMILIES = ("encoder", "decoder", "layerwise")
PROMPT = "Yes or No?"
QUERY = "what is the giant panda?"
PASSAGES = ["hi", "The giant panda is a bear species endemic to China. " * 4, "大熊猫是中国特有的熊类动物。", ""]


def logged(folder: Path, key: str) -> dict[int, float]:
    """What was logged under a key, by step."""
    lines = (folder / "training.jsonl").read_text().splitlines()
    return {entry["step"]: entry[key] for entry in map(json.loads, lines) if key in entry}


@pytest.mark.parametrize(
    ("family", "flags"),
    [
        ("encoder", ["--learning-rate=3e-3", "--max-steps=150"]),
        ("decoder", ["--learning-rate=1e-3", "--max-steps=40", f"--prompt={PROMPT}", "--no-lora"]),
        ("layerwise", ["--learning-rate=3e-3", "--max-steps=60", f"--prompt={PROMPT}", "--self-distillation"]),
    ],
)
def test_a_family_learns_a_separable_task_and_ranks_held_out_pairs(
    family: str, flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    always = "panda" if family == "encoder" else None
    lines, unseen = toy_lines(120, 0, always=always), toy_lines(40, 1, always=always)
    data, folder, model = write_lines(tmp_path / "train.jsonl", lines), tmp_path / "out", str(DATA / family)
    prompt = {} if family == "encoder" else {"prompt": PROMPT}
    with Scorer(model, **prompt) as scorer:
        assert accuracy(scorer, unseen) < 0.6, "there is nothing to learn"

    options = ["--train-group-size=4", "--per-device-train-batch-size=8", "--logging-steps=5", "--eval-steps=20"]
    assert main(["finetune", model, "--data", data, "--output-dir", str(folder), *options, *flags]) == 0

    is_adapter = (folder / "adapter_model.safetensors").exists()
    assert is_adapter == (family == "layerwise")
    with Scorer(model, peft_path=str(folder), **prompt) if is_adapter else Scorer(str(folder), **prompt) as scorer:
        assert accuracy(scorer, lines) > 0.95
        assert accuracy(scorer, unseen) > 0.9
    losses = logged(folder, "loss")
    assert losses[max(losses)] < losses[5] / 2
    assert list(logged(folder, "eval_mrr").values())[-1] > 0.95
    assert (folder / "training.png").read_bytes().startswith(b"\x89PNG")
    captured = capsys.readouterr()
    assert captured.err == "", "no noise, and no bar where there is no terminal"
    assert f"peft_path='{folder}'" in captured.out if is_adapter else f"Scorer('{folder}')" in captured.out


def moved_and_saved(settings: FinetuneSettings, folder: Path) -> list[float]:
    """Scores in training, with every trained weight moved away from where it was, of what is then in the folder."""
    trainee = trainee_of(settings).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in trainee.parameters():
            if parameter.requires_grad:
                parameter += 0.02 * torch.randn_like(parameter)
        scores: list[float] = trainee(**Collator(trainee.encoder())([Group(QUERY, PASSAGES)]))[:, -1].tolist()
    trainee.export(folder)
    return scores


@pytest.mark.parametrize("merge", [False, True], ids=["plain", "merged"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_before_saving_are_those_after_loading(family: str, lora: bool, merge: bool, tmp_path: Path) -> None:
    """With lengths that cut query and passages, and every trained weight moved away from where it was."""
    prompt = {} if family == "encoder" else {"prompt": PROMPT}
    instructions = {"query_instruction": "the ", "passage_instruction": "a "}
    settings = FinetuneSettings(
        model=str(DATA / family), data="-", output_dir="-", lora=lora, merge=merge, query_max_len=9, passage_max_len=31,
        **prompt, **instructions,
    )  # fmt: skip
    before = moved_and_saved(settings, tmp_path)

    options: dict[str, Any] = {"query_max_length": 9, "max_length": 40, **prompt, **instructions}
    where = {"model": settings.model, "peft_path": str(tmp_path)} if lora and not merge else {"model": str(tmp_path)}
    with Scorer(settings.model, **options) as untrained:
        assert untrained.score(QUERY, PASSAGES) != pytest.approx(before, abs=1e-3)
    with Scorer(**where, **options) as scorer:
        assert scorer.score(QUERY, PASSAGES) == pytest.approx(before, abs=1e-4)


@pytest.mark.parametrize("architecture", Decoder.architectures)
def test_every_language_model_is_scored_as_it_was_trained(
    architecture: str, causal_dirs: dict[str, str], tmp_path: Path
) -> None:
    """Gemma 2 could not be trained: transformers has no SDPA with its soft caps."""
    model = causal_dirs[architecture.removesuffix("ForCausalLM")]
    before = moved_and_saved(FinetuneSettings(model=model, data="-", output_dir="-", lora=False), tmp_path)
    with Scorer(str(tmp_path)) as scorer:
        assert scorer.score(QUERY, PASSAGES) == pytest.approx(before, abs=1e-4)


def test_a_soft_cap_that_the_model_does_not_look_at_is_not_trained_with(
    causal_dirs: dict[str, str], tmp_path: Path
) -> None:
    """The scores of a Gemma were capped in training, as those of Gemma 2 are, and not after it."""
    model = tmp_path / "named"
    shutil.copytree(causal_dirs["Gemma"], model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"final_logit_softcapping": 0.5}))
    before = moved_and_saved(FinetuneSettings(model=str(model), data="-", output_dir="-", lora=False), tmp_path / "out")
    with Scorer(str(tmp_path / "out")) as scorer:
        assert scorer.score(QUERY, PASSAGES) == pytest.approx(before, abs=1e-4)


def test_an_adapter_on_the_head_is_refused_where_it_would_not_be_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One row of the head is read, past its adapter, which was then saved as it had begun."""
    data, out = write_lines(tmp_path / "train.jsonl", toy_lines(4, 0)), tmp_path / "out"
    command = ["finetune", str(DATA / "decoder"), "--data", data, "--output-dir", str(out)]
    assert main([*command, "--target-modules=q_proj,lm_head"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "target_modules=['q_proj', 'lm_head']: 'lm_head' is the head" in line
    assert "q_proj, k_proj, v_proj, o_proj" in line
    assert "lora=False" in line
    assert not out.exists()

    trained_whole = FinetuneSettings(
        model=str(DATA / "layerwise"), data="-", output_dir="-", target_modules=["q_proj", "linear_head"]
    )
    moved_and_saved(trained_whole, out)
    with pytest.raises(ValueError, match="'lm_head' is the head"):
        trainee_of(trained_whole.model_copy(update={"target_modules": ["lm_head"]}))


@pytest.mark.parametrize("merge", [False, True], ids=["plain", "merged"])
def test_an_adapter_on_words_leaves_the_output_words_that_are_tied_to_them(merge: bool, tmp_path: Path) -> None:
    """Merging into one side changed the other one, which training had left as it was; also where another comes on top."""
    words = FinetuneSettings(
        model=str(DATA / "decoder"), data="-", output_dir="-", merge=merge, target_modules="embed_tokens"
    )
    before = moved_and_saved(words, tmp_path / "words")
    where = (
        {"model": str(tmp_path / "words")} if merge else {"model": words.model, "peft_path": str(tmp_path / "words")}
    )
    with Scorer(**where) as scorer:
        assert scorer.score(QUERY, PASSAGES) == pytest.approx(before, abs=1e-4)
    for targets in ("embed_tokens", "q_proj"):
        on_top = FinetuneSettings(**where, data="-", output_dir="-", lora=True, merge=True, target_modules=targets)
        before = moved_and_saved(on_top, tmp_path / targets)
        with Scorer(str(tmp_path / targets)) as scorer:
            assert scorer.score(QUERY, PASSAGES) == pytest.approx(before, abs=1e-4), targets


@pytest.mark.parametrize("family", FAMILIES)
def test_dropout_can_be_set_and_is_not_saved(family: str, tmp_path: Path) -> None:
    def spread(dropout: float | None) -> float:
        """How much two passes in training differ."""
        settings = FinetuneSettings(model=str(DATA / family), data="-", output_dir="-", lora=False, dropout=dropout)
        trainee = trainee_of(settings).train()
        batch = Collator(trainee.encoder())([Group(QUERY, PASSAGES)])
        trainee.export(tmp_path / str(dropout))
        with torch.no_grad():
            return float((trainee(**batch) - trainee(**batch)).abs().max())

    assert spread(0.0) == 0
    assert spread(0.5) > 1e-3
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("0.0", "0.5")]
    assert configs[0] == configs[1]


def test_lines_with_a_prompt_are_named_where_a_cross_encoder_does_not_use_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lines = [line | {"prompt": PROMPT} for line in toy_lines(4, 0)]
    data = write_lines(tmp_path / "train.jsonl", lines)
    finetune(
        FinetuneSettings(
            model=str(DATA / "encoder"), data=data, output_dir=str(tmp_path / "out"), held_out=0, max_steps=1
        )
    )
    assert "4 lines have a prompt" in caplog.text
    caplog.clear()
    settings = FinetuneSettings(
        model=str(DATA / "decoder"), data=data, output_dir=str(tmp_path / "llm"), held_out=0, max_steps=1
    )
    finetune(settings)
    assert "prompt" not in caplog.text


def test_every_layer_of_a_layerwise_model_is_scored_as_it_was_trained(tmp_path: Path) -> None:
    settings = FinetuneSettings(model=str(DATA / "layerwise"), data="-", output_dir="-", lora=False, start_layer=5)
    trainee = trainee_of(settings).eval()
    with torch.no_grad():
        before = trainee(**Collator(trainee.encoder())([Group(QUERY, PASSAGES)]))
    trainee.export(tmp_path)

    assert trainee.heads == tuple(f"layer {layer}" for layer in range(5, 12))
    with Scorer(str(tmp_path)) as scorer:
        for place, (layer, scores) in enumerate(scorer.score_layers(QUERY, PASSAGES, range(5, 12)).items()):
            assert scores == pytest.approx(before[:, place].tolist(), abs=1e-4), layer


def test_what_is_saved_has_the_published_layout(tmp_path: Path) -> None:
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    for family in FAMILIES:
        settings = FinetuneSettings(model=str(DATA / family), data="-", output_dir="-", lora=False)
        trainee_of(settings).export(tmp_path / family)
        files = [safe_open(folder / family / "model.safetensors", "pt") for folder in (DATA, tmp_path)]  # type: ignore[no-untyped-call]
        published, saved = (set(file.keys()) for file in files)
        assert saved == published - {name for name in published if name not in saved and name == "lm_head.weight"}
        assert (tmp_path / family / "tokenizer.json").read_bytes() == (DATA / family / "tokenizer.json").read_bytes()
    before, after = (json.loads((folder / "layerwise" / "config.json").read_text()) for folder in (DATA, tmp_path))
    assert after == before
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "encoder").num_labels == 1
    AutoModelForCausalLM.from_pretrained(tmp_path / "decoder")


def base_model(family: str, folder: Path) -> str:
    """The family's tiny checkpoint as a base model without a scoring head, in that one's layout."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(DATA / family, folder)
    weights = load_file(DATA / family / "model.safetensors")
    bare = {name: tensor for name, tensor in weights.items() if not name.startswith(("classifier.", "lm_head."))}
    assert len(bare) < len(weights)
    save_file(bare, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    architectures = {"encoder": "XLMRobertaForMaskedLM", "layerwise": "MiniCPMForCausalLM"}
    for name in ("id2label", "label2id", "start_layer", "head_multi", "head_type"):
        config.pop(name, None)
    (folder / "config.json").write_text(json.dumps(config | {"architectures": [architectures[family]]}))
    return str(folder)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("family", ["encoder", "layerwise"])
def test_a_base_model_becomes_a_reranker(family: str, lora: bool, tmp_path: Path) -> None:
    model, out = base_model(family, tmp_path / "base"), tmp_path / "out"
    data = write_lines(tmp_path / "train.jsonl", toy_lines(8, 0))
    with pytest.raises(ValueError, match="is not supported"):
        Scorer(model).score(QUERY, PASSAGES)

    result = finetune(
        FinetuneSettings(model=model, data=data, output_dir=str(out), lora=lora, max_steps=2, train_group_size=3)
    )

    assert result.is_adapter == (lora and family == "encoder"), "heads alone make no MiniCPM a layerwise reranker"
    with Scorer(**{"model": model, "peft_path": str(out)} if result.is_adapter else {"model": str(out)}) as scorer:
        scores = scorer.score(QUERY, PASSAGES)
        assert len(set(scores)) == len(PASSAGES)
        if family == "layerwise":
            assert set(scorer.score_layers(QUERY, PASSAGES, range(8, 12))) == {8, 9, 10, 11}


@pytest.mark.parametrize("merge", [False, True], ids=["plain", "merged"])
@pytest.mark.parametrize("base", ["BertForMaskedLM", "BertModel without a pooler", "BertModel"])
def test_a_pooler_that_is_new_comes_with_the_adapter(
    base: str, merge: bool, classifier_dirs: dict[str, str], tmp_path: Path
) -> None:
    """It stood in no file, so that the adapter could not be loaded."""
    from transformers import BertConfig, BertForMaskedLM, BertModel

    model = tmp_path / "base"
    shutil.copytree(classifier_dirs["bert"], model)
    config = BertConfig.from_pretrained(model)
    torch.manual_seed(0)
    made = BertForMaskedLM(config) if base == "BertForMaskedLM" else BertModel(config, base == "BertModel")
    made.save_pretrained(model)
    settings = FinetuneSettings(model=str(model), data="-", output_dir="-", lora=True, merge=merge)
    before = moved_and_saved(settings, tmp_path / "out")

    assert len(set(before)) == len(PASSAGES)
    where = {"model": tmp_path / "out"} if merge else {"model": model, "peft_path": tmp_path / "out"}
    with Scorer(**{name: str(path) for name, path in where.items()}) as scorer:  # type: ignore[arg-type]
        assert scorer.score(QUERY, PASSAGES) == pytest.approx(before, abs=1e-4)


def run_killed_after(command: list[str], checkpoint: Path) -> None:
    """Runs a command, and kills it as soon as a checkpoint is written to its end."""
    with subprocess.Popen([sys.executable, "-m", "bge_rerank_plugins", *command], cwd=DATA.parents[1]) as process:
        deadline = time.monotonic() + 120
        while not (checkpoint / "trainer_state.json").exists() and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL, "it must not have come to its end"


@pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")
@pytest.mark.parametrize(
    ("family", "logging_steps", "losses"), [("encoder", 1, 40), ("layerwise", 1, 40), ("encoder", 10, 7)]
)
def test_a_run_that_was_killed_and_resumed_has_the_losses_of_one_that_was_not(
    family: str, logging_steps: int, losses: int, tmp_path: Path
) -> None:
    """With dropout, negatives drawn anew for every pass, and a checkpoint in the middle of the second pass.

    A resumed run sums losses from the checkpoint on, so that every saved step is logged.
    """
    lines = [line | {"neg": line["neg"][:1]} for line in toy_lines(40, 0)]
    data = write_lines(tmp_path / "train.jsonl", lines)
    command = [
        "finetune", str(DATA / family), "--data", data, "--max-steps=40", f"--logging-steps={logging_steps}", "--save-steps=13",
        "--train-group-size=4", "--per-device-train-batch-size=2", "--gradient-accumulation-steps=2", "--use-cpu",
    ]  # fmt: skip
    whole, parted = tmp_path / "whole", tmp_path / "parted"

    assert main([*command, "--output-dir", str(whole)]) == 0
    run_killed_after([*command, "--output-dir", str(parted)], parted / "checkpoint-13")
    assert main([*command, "--output-dir", str(parted), "--resume"]) == 0

    for key in ("loss", "eval_mrr"):
        assert logged(parted, key) == pytest.approx(logged(whole, key), abs=1e-5)
    assert len(logged(whole, "loss")) == losses


def test_a_run_is_not_resumed_with_other_settings_and_not_started_in_a_used_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_lines(tmp_path / "train.jsonl", toy_lines(8, 0))
    command = ["finetune", str(DATA / "encoder"), "--data", data, "--output-dir", str(tmp_path / "out")]
    command += ["--lr-scheduler-type=constant"]
    assert main([*command, "--max-steps=2", "--train-group-size=4"]) == 0
    trained, said = (tmp_path / "out" / "model.safetensors").read_bytes(), capsys.readouterr().out
    for flags, message in [
        (["--max-steps=2", "--train-group-size=4"], "not empty"),
        (["--max-steps=3", "--train-group-size=4", "--resume"], "max_steps=3: the run that is to be resumed had max_steps=2"),
    ]:  # fmt: skip
        capsys.readouterr()
        assert main([*command, *flags]) == 2
        assert message in capsys.readouterr().err
    assert main([*command, "--max-steps=2", "--train-group-size=4", "--resume"]) == 0, (
        "a run that is over may be resumed"
    )
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == trained, "and goes no further"
    assert capsys.readouterr().out == said


def test_a_run_in_bfloat16_that_is_over_may_be_resumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where nothing was left to train, its held-out lines were scored without autocast, and the types did not fit."""
    data, out = write_lines(tmp_path / "train.jsonl", toy_lines(24, 0)), tmp_path / "out"
    command = ["finetune", str(DATA / "encoder"), "--data", data, "--output-dir", str(out), "--train-group-size=3"]
    command += ["--max-steps=2", "--lora", "--bf16"]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "held-out MRR" in said
    assert main([*command, "--resume"]) == 0
    assert capsys.readouterr().out == said


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_damaged_checkpoint_is_named(lora: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = write_lines(tmp_path / "train.jsonl", toy_lines(8, 0)), tmp_path / "out"
    command = ["finetune", str(DATA / "encoder"), "--data", data, "--output-dir", str(out), "--train-group-size=4"]
    command += ["--max-steps=2", "--lora" if lora else "--no-lora"]
    assert main(command) == 0
    weights = out / "checkpoint-2" / ("adapter_model.safetensors" if lora else "model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-100])
    capsys.readouterr()

    assert main([*command, "--resume"]) == 2

    (line,) = capsys.readouterr().err.splitlines()
    assert f"{weights.parent}: its weights cannot be loaded: Error while deserializing header" in line


def test_only_what_is_named_as_a_checkpoint_is_resumed_from(tmp_path: Path) -> None:
    """Copies that somebody keeps beside them, under other names, ended the run."""
    for name in ("9", "10", "11.bak", "best", ""):
        (tmp_path / f"checkpoint-{name}").mkdir()
        (tmp_path / f"checkpoint-{name}" / "trainer_state.json").write_text("{}")
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-10"


def test_the_same_seed_gives_the_same_run_and_another_one_another(tmp_path: Path) -> None:
    data = write_lines(tmp_path / "train.jsonl", [line | {"neg": []} for line in toy_lines(20, 0)])

    def losses(name: str, seed: int) -> list[float]:
        finetune(
            FinetuneSettings(
                model=str(DATA / "decoder"), data=data, output_dir=str(tmp_path / name), seed=seed, max_steps=6,
                train_group_size=3, logging_steps=1, prompt=PROMPT, gradient_checkpointing=True, bf16=name == "bf16",
            )
        )  # fmt: skip
        return list(logged(tmp_path / name, "loss").values())

    first = losses("first", 0)
    assert losses("again", 0) == first
    assert losses("other", 1) != pytest.approx(first, abs=1e-3)
    assert losses("bf16", 0) == pytest.approx(first, rel=0.1)


def test_two_processes_train_as_one_with_twice_the_batch(tmp_path: Path) -> None:
    data = write_lines(tmp_path / "train.jsonl", toy_lines(40, 0))
    common = ["-m", "bge_rerank_plugins", "finetune", str(DATA / "decoder"), "--data", data, "--no-lora", "--use-cpu"]
    common += ["--train-group-size=4", "--max-steps=4", "--logging-steps=1", "--learning-rate=1e-3", "--held-out=0.1"]
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    two = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        *common,
        "--per-device-train-batch-size=2",
    ]
    one = [*common, "--per-device-train-batch-size=4"]
    for name, arguments in (("two", two), ("one", one)):
        command = [sys.executable, "-W", "ignore", *arguments, "--output-dir", str(tmp_path / name)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False, env=environment)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("Scorer(") == 1, "said once, by the first process"
    assert logged(tmp_path / "two", "loss") == pytest.approx(logged(tmp_path / "one", "loss"), abs=1e-5)
    assert logged(tmp_path / "two", "eval_mrr") == logged(tmp_path / "one", "eval_mrr")
    with Scorer(str(tmp_path / "two")) as two_scorer, Scorer(str(tmp_path / "one")) as one_scorer:
        assert two_scorer.score(QUERY, PASSAGES) == pytest.approx(one_scorer.score(QUERY, PASSAGES), abs=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_on_top_of_another_is_merged_with_it(family: str, tmp_path: Path) -> None:
    """Only the second one was saved, and what the first had learned was gone."""
    data = write_lines(tmp_path / "train.jsonl", toy_lines(8, 0))
    common = {"model": str(DATA / family), "data": data, "lora": True, "train_group_size": 2, "held_out": 0}
    first = finetune(
        FinetuneSettings(output_dir=str(tmp_path / "a"), max_steps=3, learning_rate=1e-2, **common)  # type: ignore[arg-type]
    )
    assert first.is_adapter
    second = finetune(
        FinetuneSettings(
            output_dir=str(tmp_path / "b"), peft_path=first.output_dir, max_steps=1, learning_rate=1e-9, **common
        )  # type: ignore[arg-type]
    )
    assert not second.is_adapter
    assert math.isfinite(first.loss), "of a run that is shorter than what is logged"
    with Scorer(str(DATA / family), peft_path=first.output_dir) as once, Scorer(second.output_dir) as twice:
        assert twice.score(QUERY, PASSAGES) == pytest.approx(once.score(QUERY, PASSAGES), abs=1e-4)


def test_what_is_merged_in_bfloat16_is_saved_as_it_was_trained(tmp_path: Path) -> None:
    settings = FinetuneSettings(model=str(DATA / "encoder"), data="-", output_dir="-", lora=True, merge=True, bf16=True)
    trainee = trainee_of(settings)
    assert {parameter.dtype for parameter in trainee.network.parameters()} == {torch.float32}


def test_a_training_that_diverges_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It ended with status 0, a loss of 0 and an MRR of 1: no score is above one that is not a number."""
    data = write_lines(tmp_path / "train.jsonl", toy_lines(12, 0))
    options = ["--learning-rate=1e35", "--max-grad-norm=0", "--max-steps=12", "--logging-steps=2"]
    assert (
        main(["finetune", str(DATA / "encoder"), "--data", data, "--output-dir", str(tmp_path / "out"), *options]) == 2
    )
    assert "the training has diverged; take a lower learning_rate than 1e+35" in capsys.readouterr().err


def test_heads_that_are_not_trained_wait_for_no_gradient() -> None:
    """Several processes wait for the gradient of everything that may be trained."""
    for lora in (False, True):
        settings = FinetuneSettings(model=str(DATA / "layerwise"), data="-", output_dir="-", start_layer=6, lora=lora)
        trainee = trainee_of(settings)
        frozen = [not any(p.requires_grad for p in head.parameters()) for head in trainee.inner.lm_head]
        assert frozen == [layer < 6 for layer in range(3, 12)]
