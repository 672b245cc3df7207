"""What stands before the training: lines that are checked, groups, hard negatives, a teacher's scores, losses."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DATA, with_a_token_more
from finetune_data import toy_lines, write_lines
from hub import Hub, put_into_cache
from hypothesis import given
from hypothesis import strategies as st

from bge_rerank_plugins import Scorer
from bge_rerank_plugins.cli import main
from bge_rerank_plugins.finetune import FinetuneSettings, MineSettings, mine
from bge_rerank_plugins.finetune.data import Groups, example_of, read_examples, same_text, split_held_out
from bge_rerank_plugins.finetune.losses import ranking_loss, teacher_distribution
from bge_rerank_plugins.finetune.trainer import mean_reciprocal_rank
from bge_rerank_plugins.jsonl import InputErrors

GOOD = {"query": "panda", "pos": ["a bear"], "neg": ["a tiger", "a species"]}
BAD: dict[str, tuple[bytes, str]] = {
    "no query": (b'{"pos": ["a"], "neg": []}', 'no "query"'),
    "empty query": (b'{"query": " ", "pos": ["a"], "neg": []}', '"query" is empty'),
    "no pos": (b'{"query": "q", "neg": []}', 'no "pos"'),
    "empty pos": (b'{"query": "q", "pos": [], "neg": ["a"]}', '"pos" is empty'),
    "no neg": (b'{"query": "q", "pos": ["a"]}', 'no "neg"'),
    "blank passage": (b'{"query": "q", "pos": ["a"], "neg": [" "]}', '"neg" has an empty passage'),
    "positive among negatives": (b'{"query": "q", "pos": ["a", "b c"], "neg": ["B  C"]}', '"pos"[1] is in "neg" too'),
    "not UTF-8": (b'{"query": "\xff", "pos": ["a"], "neg": []}', "not UTF-8"),
    "not JSON": (b'{"query": ', "not JSON"),
    "not a string": (b'{"query": "q", "pos": [1], "neg": []}', '"pos"[0] is a number, expected a string'),
    "wrong prompt": (b'{"query": "q", "pos": ["a"], "neg": [], "prompt": 1}', '"prompt" is a number'),
    "half the scores": (b'{"query": "q", "pos": ["a"], "neg": [], "pos_scores": [1]}', '"pos_scores" without'),
    "too few scores": (
        b'{"query": "q", "pos": ["a"], "neg": ["b"], "pos_scores": [1], "neg_scores": []}',
        '"neg_scores" has 0 numbers for 1 passages',
    ),
    "a score that is none": (
        b'{"query": "q", "pos": ["a"], "neg": [], "pos_scores": ["1"], "neg_scores": []}',
        '"pos_scores"[0] is a string, expected a number',
    ),
    "a score beyond a tensor's numbers": (
        b'{"query": "q", "pos": ["a"], "neg": ["b", "c"], "pos_scores": [3.4e38], "neg_scores": [0, -1e39]}',
        '"neg_scores"[1] is beyond a 32-bit float',
    ),
    "a score beyond all floats": (
        b'{"query": "q", "pos": ["a"], "neg": [], "pos_scores": [1%b], "neg_scores": []}' % (b"0" * 400),
        '"pos_scores"[0] is beyond a 32-bit float',
    ),
}


@pytest.mark.parametrize("command", ["finetune", "mine", "distill"])
@pytest.mark.parametrize(("raw", "message"), BAD.values(), ids=BAD)
def test_a_bad_line_is_named_and_nothing_is_written(
    raw: bytes, message: str, command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = tmp_path / "data.jsonl", tmp_path / "out"
    data.write_bytes(json.dumps(GOOD).encode() + b"\n\n" + raw + b"\n")

    assert main(command_line(command, str(data), str(out))) == 2

    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"bge-rerank: {data}:3: ")
    assert message in line
    assert list(tmp_path.iterdir()) == [data]


def command_line(command: str, data: str, out: str) -> list[str]:
    return {
        "finetune": ["finetune", str(DATA / "encoder"), "--data", data, "--output-dir", out],
        "mine": ["mine", data, "--output", out],
        "distill": ["distill", data, "--output", out, "--model", str(DATA / "encoder")],
    }[command]


@pytest.mark.parametrize("command", ["finetune", "mine", "distill"])
def test_every_bad_line_is_reported_at_once(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data.jsonl"
    data.write_bytes(b"\n".join([json.dumps(GOOD).encode(), *(raw for raw, _ in BAD.values())]))

    assert main(command_line(command, str(data), str(tmp_path / "out"))) == 2

    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(BAD)
    for number, (line, (_, message)) in enumerate(zip(lines, BAD.values(), strict=True), start=2):
        assert f"{data}:{number}: " in line
        assert message in line


@pytest.mark.parametrize("command", ["finetune", "mine", "distill"])
def test_a_file_without_lines_is_an_error(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data.jsonl"
    data.write_bytes(b"\n \n")
    assert main(command_line(command, str(data), str(tmp_path / "out"))) == 2
    assert capsys.readouterr().err == f"bge-rerank: {data}: no lines\n"
    assert list(tmp_path.iterdir()) == [data]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--train-group-size=9"], "data.jsonl:1: only 5 negatives, the passages of other lines included"),
        (["--train-group-size=1"], "train_group_size=1"),
        (["--passage-max-len=8"], "passage_max_len=8: give query_max_len too"),
        (["--query-max-len=300", "--passage-max-len=300"], "max_length=600: the positions of"),
        (["--query-max-len=1", "--passage-max-len=2"], "no room for text"),
        (["--prompt=Yes?"], "is a cross-encoder, which has none"),
        (["--start-layer=3"], "start_layer=3: .* is no layerwise checkpoint"),
        (["--knowledge-distillation"], 'no "pos_scores", which knowledge_distillation needs'),
        (["--lora", "--target-modules=query,nothing"], "has no layer 'nothing'"),
        (["--eval-data=/no/such/file"], "/no/such/file"),
        (["--num-train-epochs=inf", "--max-steps=1"], "num_train_epochs=inf: Input should be a finite number"),
        (["--seed=4294967296"], "seed=4294967296: Input should be less than 4294967296"),
        (["--lora-rank=4"], "lora_rank=4: .* is trained whole"),
        (["--teacher-temperature=2"], "teacher_temperature=2.0: goes with knowledge_distillation"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_anything_is_written(
    flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [GOOD, {"query": "tiger", "pos": ["a cat"], "neg": ["a bear", "a giant", "the giant"]}]
    data = write_lines(tmp_path / "data.jsonl", lines)
    options = ["--held-out=0", *(["--train-group-size=3"] if "group" not in flags[0] else [])]

    assert main([*command_line("finetune", data, str(tmp_path / "out")), *options, *flags]) == 2

    assert re.search(message, capsys.readouterr().err)
    assert [path.name for path in tmp_path.iterdir()] == ["data.jsonl"]


@pytest.mark.parametrize("held_out", [False, True], ids=["data", "eval_data"])
def test_a_prompt_that_leaves_no_room_is_named_before_anything_is_written(
    held_out: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a line that was not the first it ended the training when its turn came."""
    lines = toy_lines(5, 0)
    fine, long = lines[:1], [*lines[1:3], *({**line, "prompt": "panda " * 500} for line in lines[3:])]
    data, more = (
        write_lines(tmp_path / f"{name}.jsonl", part)
        for name, part in (("data", fine if held_out else long), ("more", long if held_out else fine))
    )
    flags = ["--data", data, "--eval-data", more, "--output-dir", str(tmp_path / "out"), "--train-group-size=3"]
    assert main(["finetune", str(DATA / "decoder"), *flags, "--query-max-len=90", "--passage-max-len=7600"]) == 2

    assert f"{more if held_out else data}:3: max_length=7690: the positions of" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", ["", "{", "7"])
def test_settings_of_a_run_that_cannot_be_read_are_named(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, there = write_lines(tmp_path / "data.jsonl", toy_lines(8, 0)), tmp_path / "out" / "finetune.json"
    there.parent.mkdir()
    there.write_text(content)

    assert main([*command_line("finetune", data, str(there.parent)), "--resume", "--train-group-size=2"]) == 2

    assert f"{there}: not the settings of a run that can be resumed" in capsys.readouterr().err


def test_a_run_is_resumed_where_its_folder_is_spelt_otherwise_or_was_moved(tmp_path: Path) -> None:
    """As a shell completes it, with a slash at its end, it was refused."""
    data = write_lines(tmp_path / "data.jsonl", toy_lines(4, 0))
    command = [*command_line("finetune", data, str(tmp_path / "out")), "--max-steps=1", "--train-group-size=2"]
    assert main([*command, "--held-out=0"]) == 0
    assert main([*command, "--held-out=0", "--resume", "--output-dir", f"{tmp_path / 'out'}/"]) == 0
    (tmp_path / "out").rename(tmp_path / "moved")
    assert main([*command, "--held-out=0", "--resume", "--output-dir", str(tmp_path / "moved")]) == 0
    assert not (tmp_path / "out").exists()


def test_a_layer_without_a_head_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_lines(tmp_path / "data.jsonl", toy_lines(3, 0))
    flags = ["--data", data, "--output-dir", str(tmp_path / "out"), "--train-group-size=3", "--start-layer=2"]
    assert main(["finetune", str(DATA / "layerwise"), *flags]) == 2
    assert "start_layer=2: this checkpoint scores at layers 3 to 11" in capsys.readouterr().err


# Groups.


passages = st.lists(st.text("abc ", min_size=1).filter(str.strip), min_size=1, max_size=3)


@given(
    lines=st.lists(st.tuples(st.sampled_from(["q", "Q ", "r"]), passages, passages), min_size=1, max_size=6),
    size=st.integers(2, 4),
    seed=st.integers(0, 5),
)
def test_a_group_has_one_positive_first_and_no_positive_of_its_query_among_the_others(
    lines: list[tuple[str, list[str], list[str]]], size: int, seed: int
) -> None:
    answers: dict[str, set[str]] = {}
    for query, pos, _ in lines:
        answers.setdefault(same_text(query), set()).update(map(same_text, pos))
    # A line's own negatives are the user's word, so only what is drawn from other lines must be free of positives.
    records = [
        {"query": q, "pos": pos, "neg": [n for n in neg if same_text(n) not in answers[same_text(q)]]}
        for q, pos, neg in lines
    ]
    examples = [example_of(record) for record in records]
    try:
        groups = Groups(examples, size, seed)
    except InputErrors:
        return
    for index, example in enumerate(examples):
        group = groups[index]
        assert len(group.passages) == size
        assert group.passages[0] in example.pos
        assert not {same_text(text) for text in group.passages[1:]} & answers[same_text(example.query)]
        own = sum(text in example.neg for text in group.passages[1:])
        assert own >= min(len(example.neg), size - 1)


def test_groups_differ_between_passes_and_not_between_runs() -> None:
    examples = [example_of(line | {"neg": []}) for line in toy_lines(30, 0)]

    def drawn(epoch: int, seed: int) -> list[list[str]]:
        groups = Groups(examples, 4, seed)
        groups.epoch = epoch
        return [groups[index].passages for index in reversed(range(len(groups)))]

    assert drawn(1, 0) == drawn(1, 0)
    assert drawn(0, 0) != drawn(1, 0)
    assert drawn(0, 0) != drawn(0, 1)


def test_held_out_lines_are_not_trained_on() -> None:
    examples = [example_of(line, str(number)) for number, line in enumerate(toy_lines(50, 0))]
    training, held_out = split_held_out(examples, 0.1, 500, 0)
    assert (len(training), len(held_out)) == (45, 5)
    assert not {example.place for example in training} & {example.place for example in held_out}
    assert split_held_out(examples, 0, 500, 0) == (examples, [])
    assert len(split_held_out(examples, 0.9, 7, 0)[1]) == 7


def test_what_answers_a_query_on_a_held_out_line_is_no_negative_of_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a line for each positive, one of another line was drawn as a negative of the query that it answers."""
    lines = [{"query": "q", "pos": ["a"], "neg": ["b"]}, {"query": "r", "pos": ["c"], "neg": ["A 2"]}]
    held_out = [{"query": "Q ", "pos": ["a 2"], "neg": []}]
    groups = Groups([*map(example_of, lines)], 3, 0, held_out=[*map(example_of, held_out)])
    for groups.epoch in range(20):
        assert groups[0].passages == ["a", "b", "c"]

    data, more = write_lines(tmp_path / "data.jsonl", lines), write_lines(tmp_path / "more.jsonl", held_out)
    flags = ["--eval-data", more, "--train-group-size=4"]
    assert main([*command_line("finetune", data, str(tmp_path / "out")), *flags]) == 2
    assert "data.jsonl:1: only 2 negatives" in capsys.readouterr().err


@given(
    queries=st.lists(st.sampled_from(["q", "Q ", "r", "s", "t"]), min_size=1, max_size=12),
    share=st.floats(0, 1, exclude_max=True),
    most=st.integers(1, 12),
)
def test_a_query_is_held_out_with_all_its_lines_or_not_at_all(queries: list[str], share: float, most: int) -> None:
    """MRR on held-out lines was that of queries that had been trained on."""
    examples = [example_of({"query": query, "pos": ["a"], "neg": []}, str(i)) for i, query in enumerate(queries)]
    training, held_out = split_held_out(examples, share, most, 0)
    assert not {same_text(example.query) for example in training} & {same_text(example.query) for example in held_out}
    assert sorted([*training, *held_out], key=lambda example: int(example.place)) == examples
    assert training
    assert len(held_out) <= most
    smallest = min(Counter(map(same_text, queries)).values())
    assert len(held_out) <= max(1, round(share * len(queries)), smallest)
    if share and smallest <= min(most, len(queries) // 2):
        assert held_out


@pytest.mark.parametrize(
    ("sizes", "held"), [([90] + [1] * 10, 10), ([400, 10], 10), ([600] * 10, 0), ([200, 100], 100), ([20], 0)], ids=str
)
@pytest.mark.parametrize("seed", range(4))
def test_queries_with_many_lines_do_not_take_what_there_is_to_train_on(sizes: list[int], held: int, seed: int) -> None:
    """One of them was held out whole, with nine tenths of the data, or none was where the first that were drawn were too many."""
    lines = [str(query) for query, size in enumerate(sizes) for _ in range(size)]
    examples = [example_of({"query": line, "pos": ["a"], "neg": []}, "") for line in lines]
    assert len(split_held_out(examples, 0.1, 500, seed)[1]) == held


def test_that_nothing_can_be_held_out_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = write_lines(tmp_path / "data.jsonl", [{"query": "q", "pos": ["a"], "neg": ["b"]}] * 20)
    flags = ["--train-group-size=2", "--max-steps=1"]
    assert main([*command_line("finetune", data, str(tmp_path / "out")), *flags]) == 0
    assert "no lines are held out, so that no MRR is measured: every query has too many of them" in caplog.text


def test_that_one_line_cannot_be_held_out_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = write_lines(tmp_path / "data.jsonl", [{"query": "q", "pos": ["a"], "neg": ["b"]}])
    flags = ["--train-group-size=2", "--max-steps=1"]
    assert main([*command_line("finetune", data, str(tmp_path / "out")), *flags]) == 0
    assert "no MRR is measured: there is only one; give eval_data" in caplog.text


# Losses.


def test_the_loss_is_cross_entropy_of_the_first_passage_summed_over_heads() -> None:
    torch.manual_seed(0)
    scores = torch.randn(3, 4, 2)
    expected = sum(torch.nn.functional.cross_entropy(scores[..., head], torch.zeros(3).long()) for head in (0, 1))
    torch.testing.assert_close(ranking_loss(scores), expected)


def test_a_teacher_is_followed_and_a_passage_without_a_score_has_no_share() -> None:
    torch.manual_seed(0)
    given = torch.tensor([[1.0, 2.0, -torch.inf], [0.0, -1.0, 3.0]])
    teacher = teacher_distribution(given, 2.0)
    assert teacher[0, 2] == 0
    scores = torch.randn(2, 3, 1, requires_grad=True)
    expected = torch.nn.functional.kl_div(scores[..., 0].log_softmax(1), teacher, reduction="batchmean")
    torch.testing.assert_close(ranking_loss(scores, teacher), ranking_loss(scores) + expected)
    ranking_loss(scores, teacher).backward()
    assert scores.grad is not None
    assert scores.grad.isfinite().all()
    same = (given[1] / 2)[None, :, None]
    assert ranking_loss(same, teacher[1:]).item() == pytest.approx(ranking_loss(same).item(), abs=1e-6)


def test_self_distillation_moves_the_lower_heads_towards_the_last_one_only() -> None:
    torch.manual_seed(0)
    scores = torch.randn(2, 3, 3, requires_grad=True)
    (ranking_loss(scores, self_distillation=True) - ranking_loss(scores)).backward()
    assert scores.grad is not None
    assert scores.grad[..., :2].abs().min() > 0
    assert scores.grad[..., 2].abs().max() < 1e-6


def test_ties_do_not_help_the_reciprocal_rank() -> None:
    group = Groups([example_of(GOOD)], 3, 0)[0]
    assert mean_reciprocal_rank([[1.0, 1.0, 0.0]], [group]) == 1 / 2
    assert mean_reciprocal_rank([[1.0, 2.0, 3.0], [1.0, 0.0, 0.0]], [group, group]) == pytest.approx((1 / 3 + 1) / 2)


# Mining.


worded = st.lists(
    st.lists(st.sampled_from(["panda", "Panda", "bear", "tiger"]), min_size=1, max_size=3).map(" ".join),
    min_size=1,
    max_size=3,
)


@given(
    lines=st.lists(
        st.tuples(st.sampled_from(["panda bear", "Panda  bear", "tiger"]), worded, worded), min_size=1, max_size=6
    ),
    first=st.integers(1, 3),
    negatives=st.integers(1, 5),
)
def test_mining_never_returns_a_positive(
    lines: list[tuple[str, list[str], list[str]]], first: int, negatives: int
) -> None:
    """Not even one that answers the query on another line, or differs in case and white space."""
    records = [
        {"query": q, "pos": pos, "neg": [n for n in neg if same_text(n) not in set(map(same_text, pos))]}
        for q, pos, neg in lines
    ]
    answers: dict[str, set[str]] = {}
    for record in records:
        answers.setdefault(same_text(record["query"]), set()).update(map(same_text, record["pos"]))
    mined = mine(records, MineSettings(first=first, last=20, negatives=negatives))
    for before, after in zip(records, mined, strict=True):
        assert after["pos"] == before["pos"]
        if after["neg"] != before["neg"]:
            assert not {same_text(text) for text in after["neg"]} & answers[same_text(after["query"])]
            assert len(after["neg"]) <= negatives


def mining_lines() -> list[dict[str, Any]]:
    texts = [f"{'panda ' * count}bear" for count in range(1, 9)]
    return [
        {"id": 1, "query": "panda", "pos": [texts[-1]], "neg": texts[:-1], "pos_scores": [1], "neg_scores": [0] * 7}
    ]


def test_mining_draws_from_the_places_asked_for(tmp_path: Path) -> None:
    data = write_lines(tmp_path / "data.jsonl", mining_lines())
    for name, text in (
        ("a", "panda bear"),
        ("b", "tiger"),
        ("c", "no"),
        ("d", "panda of China"),
        ("e", "A PANDA panda"),
    ):
        with (tmp_path / "corpus.jsonl").open("a") as corpus:
            corpus.write(json.dumps({"id": name, "text": text}) + "\n")
    flags = ["--corpus", str(tmp_path / "corpus.jsonl"), "--first=2", "--last=3", "--negatives=2"]

    assert main(["mine", data, "--output", str(tmp_path / "out.jsonl"), *flags]) == 0

    (record,) = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert record == {
        "id": 1,
        "query": "panda",
        "pos": ["panda " * 8 + "bear"],
        "neg": ["panda of China", "panda bear"],
    }
    read_examples(str(tmp_path / "out.jsonl"))


def test_mining_says_why_it_found_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In Chinese BM25 has a word for each run of letters, which no query shares."""
    chinese = [{"query": f"熊猫是什么{i}", "pos": [f"熊猫是一种动物{i}"], "neg": []} for i in range(3)]
    out = str(tmp_path / "out.jsonl")
    assert main(["mine", write_lines(tmp_path / "zh.jsonl", chinese), "--output", out, "--first=1"]) == 0
    few, why = capsys.readouterr().err.splitlines()
    assert few == "bge-rerank: 3 of 3 lines have fewer than 15 negatives"
    assert why == (
        "bge-rerank: BM25 found none from place 1 to 210; text without spaces between words needs --retriever ENCODER"
    )
    assert main(["mine", write_lines(tmp_path / "en.jsonl", toy_lines(3, 0)), "--output", out, "--first=1"]) == 0
    assert len(capsys.readouterr().err.splitlines()) == 1, "some were found, though few"


def test_mining_with_an_encoder_finds_what_it_holds_to_be_near(tmp_path: Path) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from bge_rerank_plugins.models import embedded_base

    base = str(embedded_base())
    records = [
        {"query": "Which animal lives in China?", "pos": ["The giant panda."], "neg": ["A tyre.", "A black bear."]}
    ]
    settings = MineSettings(retriever=base, first=1, last=2, negatives=1)

    (mined,) = mine(records, settings)

    assert sentence_transformers is not None
    assert mined["neg"] == ["A black bear."]
    with pytest.raises(ValueError, match=r"retriever='/no/such/dir': not 'bm25'"):
        mine(records, MineSettings(retriever="/no/such/dir"))


def test_an_encoder_to_mine_with_comes_from_where_the_options_say(tmp_path: Path) -> None:
    """There were no such options."""
    pytest.importorskip("sentence_transformers")
    from bge_rerank_plugins.models import embedded_base

    put_into_cache(tmp_path / "cache", "some-org/mini", embedded_base())
    data, out = write_lines(tmp_path / "data.jsonl", mining_lines()), str(tmp_path / "out.jsonl")
    arguments = ["mine", data, "--output", out, "--retriever", "some-org/mini", "--first=1", "--negatives=2"]
    local = [*arguments, "--cache-dir", str(tmp_path / "cache"), "--local-files-only", "--token", "first"]
    code = f"from bge_rerank_plugins.cli import main\nassert main({local}) == 0\nmain({[*arguments, '--token=second']})"
    with Hub() as hub:
        ran = hub.run(code, tmp_path / "home")

    assert len(json.loads(Path(out).read_text())["neg"]) == 2, ran.stderr
    assert {token for path, token in hub.asked if "some-org" in path} == {"Bearer second"}, hub.asked


def test_an_empty_range_and_an_overwritten_input_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_lines(tmp_path / "data.jsonl", mining_lines())
    before = Path(data).read_bytes()
    assert main(["mine", data, "--output", str(tmp_path / "out"), "--first=5", "--last=4"]) == 2
    assert "last=4: less than first=5" in capsys.readouterr().err
    for command in ("mine", "distill"):
        assert main(command_line(command, data, data)) == 2
        assert "that is the input" in capsys.readouterr().err
    assert Path(data).read_bytes() == before


def test_an_overwritten_corpus_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_lines(tmp_path / "data.jsonl", mining_lines())
    corpus = write_lines(tmp_path / "corpus.jsonl", [{"text": "a bear"}, {"text": "a cat"}])
    before = Path(corpus).read_bytes()
    assert main(["mine", data, "--corpus", corpus, "--output", corpus]) == 2
    assert f"--output {corpus}: that is the input {corpus}, which would be lost" in capsys.readouterr().err
    assert Path(corpus).read_bytes() == before


def test_a_corpus_of_empty_texts_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_lines(tmp_path / "data.jsonl", mining_lines())
    corpus = write_lines(tmp_path / "corpus.jsonl", [{"text": ""}, {"text": "  "}])
    for retriever in ("bm25", str(DATA / "encoder")):
        out = str(tmp_path / "out")
        assert main(["mine", data, "--corpus", corpus, "--output", out, "--retriever", retriever]) == 2
        assert f"corpus={corpus!r}: all of its texts are empty" in capsys.readouterr().err


def test_bad_lines_of_both_files_are_reported_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = {"query": "", "pos": ["a"], "neg": []}
    data, held_out = (write_lines(tmp_path / f"{name}.jsonl", [bad] * 2) for name in ("data", "held_out"))
    assert main([*command_line("finetune", data, str(tmp_path / "out")), "--eval-data", held_out]) == 2
    lines = capsys.readouterr().err.splitlines()
    places = [f"{file}:{number}" for file in (data, held_out) for number in (1, 2)]
    assert [line.split(": ")[1] for line in lines] == places


def test_a_line_that_lacks_a_negative_is_not_told_to_take_groups_of_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [{"query": query, "pos": [f"a {query} fox"], "neg": []} for query in ("red", "blue")]
    data = write_lines(tmp_path / "data.jsonl", lines)
    assert main([*command_line("finetune", data, str(tmp_path / "out")), "--train-group-size=2"]) == 2
    assert "train_group_size=2; give it one, or other lines to train on, besides those held" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["mine", "distill"])
def test_a_hyphen_is_standard_output(
    command: str, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of that name was written, unlike what `rerank` does."""
    monkeypatch.chdir(tmp_path)
    data = write_lines(tmp_path / "data.jsonl", toy_lines(3, 0))
    assert main(command_line(command, data, "out.jsonl")) == 0
    assert main(command_line(command, data, "-")) == 0
    assert capfdbinary.readouterr().out == (tmp_path / "out.jsonl").read_bytes()
    assert not Path("-").exists()


# Distillation.


def test_a_teachers_scores_are_written_and_learned_from(tmp_path: Path) -> None:
    """The teacher holds a negative to be as right as the positive, so a student that learns from it ranks that one second."""
    lines = [line | {"id": number} for number, line in enumerate(toy_lines(40, 0, always="panda"))]
    data = write_lines(tmp_path / "data.jsonl", lines)
    assert main(command_line("distill", data, str(tmp_path / "scored.jsonl"))) == 0
    scored = [json.loads(line) for line in (tmp_path / "scored.jsonl").read_text().splitlines()]
    with Scorer(str(DATA / "encoder")) as teacher:
        for line, record in zip(lines, scored, strict=True):
            expected = teacher.score(line["query"], [*line["pos"], *line["neg"]])
            assert record["pos_scores"] + record["neg_scores"] == pytest.approx(expected, abs=1e-5)
            assert {key: record[key] for key in line} == line

    generous = [
        record | {"pos_scores": [9.0], "neg_scores": [9.0 if "tiger" in text else 0.0 for text in record["neg"]]}
        for record in scored
    ]
    data = write_lines(tmp_path / "generous.jsonl", generous)
    flags = ["--data", data, "--output-dir", str(tmp_path / "out"), "--knowledge-distillation", "--no-lora"]
    steps = ["--max-steps=60", "--learning-rate=1e-3", "--train-group-size=4", "--per-device-train-batch-size=4"]
    assert main(["finetune", str(DATA / "decoder"), *flags, *steps, "--prompt=Yes?", "--held-out=0"]) == 0
    with Scorer(str(tmp_path / "out"), prompt="Yes?") as student:
        for line in toy_lines(10, 1, always="panda"):
            passages = [*line["pos"], *line["neg"]]
            first, second = student.rank(line["query"], passages, top_n=2)
            assert first.index == 0
            assert "tiger" in passages[second.index]


def test_what_a_teacher_cannot_score_is_named_by_its_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = with_a_token_more(DATA / "encoder", tmp_path / "model")
    lines = [{"query": f"number {number}", "pos": ["a"], "neg": ["b", "c"]} for number in range(100)]
    lines[90] = {"query": "which", "pos": ["a"], "neg": ["b", "a <weird> c"]}
    data = write_lines(tmp_path / "data.jsonl", lines)
    assert main(["distill", data, "--model", str(model), "--output", str(tmp_path / "out")]) == 2
    assert "the line with the query 'which': \"neg\"[1]: '<weird>' cannot be scored" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_lines_are_not_scored_with_another_prompt_than_they_have(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [{**line, "prompt": "Yes?"} for line in toy_lines(2, 0)]
    data, out = write_lines(tmp_path / "data.jsonl", [*lines, *toy_lines(1, 1)]), str(tmp_path / "out.jsonl")
    llm = ["distill", data, "--output", out, "--model", str(DATA / "decoder")]

    assert main(llm) == 2
    assert "there are lines with the prompt 'Yes?'; distil the lines of each prompt apart" in capsys.readouterr().err
    assert not Path(out).exists()
    assert main([*llm, "--prompt", "Yes?"]) == 0
    assert main(command_line("distill", data, out)) == 0, "a cross-encoder has none"


def test_settings_have_a_flag_and_a_description_each() -> None:
    assert all(field.description for field in FinetuneSettings.model_fields.values())
