"""The questions in plain words have answers in this Python's documentation, and the program ranks and counts them."""

import re

import pytest
from plain_questions import QUESTIONS, judged_set, main


def test_nearly_all_of_them_are_answered_here() -> None:
    data = judged_set()
    assert len(QUESTIONS) > 100
    assert len(data.queries) > 0.9 * len(QUESTIONS)
    assert all(name in data.passages for names in data.qrels.values() for name in names)
    assert not [question for question in QUESTIONS if len(question.split()) < 2 or "." in question]


def test_it_prints_the_table_of_both(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--top-k", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert re.match(r"\d+ questions, \d,\d+ passages$", lines[0])
    assert [line.split()[0] for line in lines[2:4]] == ["BM25", "embedded"]
    assert max(map(len, lines)) <= 80
