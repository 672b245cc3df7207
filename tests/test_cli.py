"""The `bge-rerank` command, from its arguments to its exit status: `rerank` and `info` on a tiny checkpoint."""

import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from bge_rerank_plugins import RerankSettings, Scorer, __version__
from bge_rerank_plugins.__main__ import main as entry_point
from bge_rerank_plugins.cli import COMMANDS, LINES_AHEAD, UNUSED, main
from bge_rerank_plugins.finetune import FinetuneSettings, MineSettings
from bge_rerank_plugins.jsonl import InputError, read_lines

DATA = Path(__file__).parent / "data"
ENCODER = str(DATA / "encoder")
QUERY = "what is panda?"
PASSAGES = ["hi", "The giant panda is a bear species endemic to China.", "大熊猫是中国特有的熊类动物。"]
GOOD = json.dumps({"query": QUERY, "passages": PASSAGES}).encode()


class Result(NamedTuple):
    status: int
    out: bytes
    err: str

    @property
    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.out.split(b"\n") if line]


def bge_rerank(*argv: str, stdin: bytes = b"") -> Result:
    """Runs the command in this process, with streams of its own."""
    out, err = io.TextIOWrapper(io.BytesIO(), encoding="ascii"), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="ascii"))
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", err)
        try:
            status = main(argv)
        except SystemExit as exit_:  # argparse leaves this way
            status = int(exit_.code or 0)
    out.flush()
    return Result(status, out.buffer.getvalue(), err.getvalue())  # type: ignore[attr-defined]


def rerank(*argv: str, stdin: bytes = b"") -> Result:
    return bge_rerank("rerank", "--model", ENCODER, *argv, stdin=stdin)


@contextmanager
def process(*argv: str) -> Iterator[subprocess.Popen[bytes]]:
    """The command as a process of its own, with pipes."""
    command = [sys.executable, "-m", "bge_rerank_plugins", *argv]
    pipe = subprocess.PIPE
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with subprocess.Popen(
        command,
        stdin=pipe,
        stdout=pipe,
        stderr=pipe,
        cwd=DATA.parents[1],
        env=buffered,
        # A shell's background job ignores interrupts, and hands that down to the tests and to what they start.
        preexec_fn=None if os.name == "nt" else lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as running:
        try:
            yield running
        finally:
            running.kill()


def expected(query: str, passages: list[str], top_n: int | None = None, **options: Any) -> list[dict[str, float]]:
    with Scorer(ENCODER, **options) as scorer:
        ranking = scorer.rank(query, passages, top_n)
    return [{"index": found.index, "score": pytest.approx(found.score, abs=1e-5)} for found in ranking]


# rerank


def test_each_line_gets_its_ranking_best_first_and_keeps_its_other_keys() -> None:
    records = [{"id": 7, "query": QUERY, "passages": PASSAGES, "gold": [1]}, {"query": "", "passages": ["", "bear"]}]

    result = rerank(stdin=b"\n".join(json.dumps(record).encode() for record in records))

    assert (result.status, result.err) == (0, "")
    assert result.records == [
        {**record, "ranking": expected(record["query"], record["passages"])} for record in records
    ]
    scores = [found["score"] for found in result.records[0]["ranking"]]
    assert scores == sorted(scores, reverse=True)


def test_flags_are_the_options_of_the_scorer() -> None:
    options = {"normalize": True, "max_length": 24, "query_instruction": "Find: ", "dtype": "float32", "device": "cpu"}
    flags = ["--normalize", "--max-length=24", "--query-instruction=Find: ", "--dtype=float32", "--device=cpu"]

    result = rerank(*flags, "--top-n=2", stdin=GOOD)

    assert result.records[0]["ranking"] == expected(QUERY, PASSAGES, 2, **options)
    assert result.records[0]["ranking"] != expected(QUERY, PASSAGES, 2)


def test_a_threshold_leaves_out_what_scores_less() -> None:
    all_scores = [found["score"] for found in rerank(stdin=GOOD).records[0]["ranking"]]

    ranking = rerank(f"--score-threshold={all_scores[1] - 1e-4}", stdin=GOOD).records[0]["ranking"]

    assert [found["score"] for found in ranking] == pytest.approx(all_scores[:2], abs=1e-5)


@pytest.mark.parametrize("number", ["-1e-3", "-1E3", "-.5", "-.5e1", "-2"])
def test_a_negative_number_is_no_flag(number: str) -> None:
    result = rerank("--score-threshold", number, "--top-n", "1")

    assert (result.status, result.err) == (0, "")


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(extra=st.dictionaries(st.text(), json_values, max_size=4), ascii_only=st.booleans())
def test_any_other_json_comes_back_as_it_was(extra: dict[str, Any], ascii_only: bool) -> None:
    record = {**extra, "query": QUERY, "passages": []}

    result = rerank(stdin=json.dumps(record, ensure_ascii=ascii_only).encode())

    assert result.records == [{**record, "ranking": []}]


def test_a_stale_ranking_is_replaced() -> None:
    result = rerank(stdin=json.dumps({"query": QUERY, "passages": [], "ranking": [{"index": 9}]}).encode())

    assert result.records[0]["ranking"] == []


def test_text_stays_readable_in_utf8_whatever_the_encoding_of_the_terminal() -> None:
    assert "大熊猫是中国特有的熊类动物。".encode() in rerank(stdin=GOOD).out


def test_blank_lines_are_skipped_and_a_byte_order_mark_and_crlf_are_read() -> None:
    result = rerank(stdin=b"\xef\xbb\xbf" + GOOD + b"\r\n\r\n  \n" + GOOD)

    assert (result.status, len(result.records)) == (0, 2)


def test_a_file_gives_the_lines_in_their_order_and_output_goes_to_a_file(tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    counts = [9, 1, 0, 5, 2] * LINES_AHEAD  # different work, and more lines than are scored at once
    source.write_text(
        "\n".join(json.dumps({"id": i, "query": "a", "passages": ["b"] * n}) for i, n in enumerate(counts))
    )

    result = rerank(str(source), "--output", str(target))

    written = [json.loads(line) for line in target.read_text().splitlines()]
    assert (result.status, result.out) == (0, b"")
    assert [(record["id"], len(record["ranking"])) for record in written] == list(enumerate(counts))


def test_a_line_is_out_before_the_next_one_is_read() -> None:
    with process("rerank", "--model", ENCODER) as running:
        assert running.stdin is not None
        assert running.stdout is not None
        for number in range(3):
            running.stdin.write(json.dumps({"id": number, "query": QUERY, "passages": PASSAGES}).encode() + b"\n")
            running.stdin.flush()
            assert json.loads(running.stdout.readline())["id"] == number
        running.stdin.close()
        assert running.wait() == 0


def test_a_dash_is_standard_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    assert len(rerank("--output", "-", stdin=GOOD).records) == 1
    assert list(tmp_path.iterdir()) == []


class Full(io.StringIO):
    """A disk with no room for errors."""

    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("stderr", [None, Full()], ids=["closed", "full"])
def test_input_that_cannot_be_used_is_status_2_also_where_nobody_can_be_told(
    stderr: Full | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bad.jsonl").write_text("nonsense\n")
    monkeypatch.setattr(sys, "stderr", stderr)
    assert main(["rerank", str(tmp_path / "bad.jsonl"), "--model", ENCODER]) == 2


def test_nesting_that_can_be_read_and_not_written_is_named_by_its_line() -> None:
    said = set()
    for depth in range(900, 1100):
        text = b'{"x": %s%s}' % (b"[" * depth, b"]" * depth)
        try:
            said |= {line.place for line in read_lines(io.BytesIO(text), "file", lambda record: None)}
        except InputError as error:
            said.add(str(error))
    assert said <= {"file:1", "file:1: nested too deeply"}


MALFORMED = {
    "not JSON": (b'{"query": "a", "passages": ["b"]', "not JSON: Expecting ',' delimiter at column 33"),
    "two objects": (b'{"query": "a", "passages": []} {}', "not JSON: Extra data at column 32"),
    "a constant": (b'{"query": "a", "passages": [], "x": NaN}', "not JSON: NaN"),
    "a huge number": (b'{"query": "a", "passages": [], "x": 1e999}', "1e999 is beyond a 64-bit float"),
    "a long integer": (
        b'{"query": "a", "passages": [], "x": %s}' % (b"1" * 5000),
        "an integer of 5,000 digits is too long",
    ),
    "nested too deeply": (b"[" * 200_000, "nested too deeply"),
    "an array": (b'["a", ["b"]]', "expected an object, got an array"),
    "no query": (b'{"passages": ["b"]}', 'no "query"'),
    "no passages": (b'{"query": "a"}', 'no "passages"'),
    "query is null": (b'{"query": null, "passages": []}', '"query" is null, expected a string'),
    "passages are a string": (
        b'{"query": "a", "passages": "b"}',
        '"passages" is a string, expected an array of strings',
    ),
    "a passage is a number": (b'{"query": "a", "passages": ["b", 3]}', '"passages"[1] is a number, expected a string'),
    "a passage is an object": (b'{"query": "a", "passages": [{}]}', '"passages"[0] is an object, expected a string'),
    "not UTF-8": (b'{"query": "\xff", "passages": []}', "not UTF-8: invalid start byte at byte 12"),
    "half a surrogate pair": (b'{"query": "a", "passages": ["\\ud83d"]}', r"half of a surrogate pair, '\ud83d'"),
    "the same in another key": (b'{"query": "a", "passages": [], "\\ude00": 1}', r"half of a surrogate pair, '\ude00'"),
}


@pytest.mark.parametrize(("line", "why"), MALFORMED.values(), ids=MALFORMED)
@pytest.mark.parametrize("from_file", [False, True])
def test_a_malformed_line_is_named_and_what_was_before_it_is_written(
    line: bytes, why: str, from_file: bool, tmp_path: Path
) -> None:
    content = b"\n".join([GOOD, b"", GOOD, line, GOOD])
    source = tmp_path / "queries.jsonl"
    source.write_bytes(content)

    result = rerank(str(source)) if from_file else rerank(stdin=content)

    assert result.status == 2
    assert result.err.startswith(f"bge-rerank: {source if from_file else '<stdin>'}:4: ")
    assert why in result.err
    assert result.err.count("\n") == 1
    assert [len(record["ranking"]) for record in result.records] == [3, 3]


def test_a_line_that_cannot_be_scored_is_named(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(ENCODER, broken)
    token = Tokenizer.from_file(str(broken / "tokenizer.json")).encode("Q", add_special_tokens=False).ids[-1]
    weights = load_file(broken / "model.safetensors")
    weights["roberta.embeddings.word_embeddings.weight"][token] = float("nan")
    save_file(weights, broken / "model.safetensors", {"format": "pt"})

    result = bge_rerank("rerank", "--model", str(broken), stdin=GOOD + b'\n{"query": "Q", "passages": ["b"]}\n' + GOOD)

    assert result.status == 2
    assert result.err.startswith("bge-rerank: <stdin>:2: pair 0: the model's score is nan in float32")
    assert len(result.records) == 1


def test_standard_error_that_is_closed_costs_the_progress_bar_only(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "lines.jsonl"
    file.write_bytes(GOOD + b"\n")
    monkeypatch.setattr(sys, "stderr", None)
    assert main(["rerank", str(file), "--model", ENCODER, "--output", str(tmp_path / "ranked.jsonl")]) == 0
    assert len(json.loads((tmp_path / "ranked.jsonl").read_text())["ranking"]) == len(PASSAGES)


ERRORS = {
    "no such model": (["--model", "./nowhere"], "model='./nowhere': no such directory"),
    "not a reranker": (["--model", str(DATA)], "it has no config.json"),
    "top_n": (["--top-n", "-1"], "top_n=-1: expected a whole number from 0, or None for all"),
    "threshold": (["--score-threshold", "nan"], "score_threshold=nan: expected a number"),
    "max_length": (["--max-length", "0"], "max_length=0: Input should be greater than or equal to 1"),
    "beyond the positions": (["--max-length", "9999"], "max_length=9999: the positions of"),
    "lengths": (["--max-length", "8", "--query-max-length", "9"], "query_max_length=9: longer than the whole pair"),
    "device": (["--device", "warp"], "device='warp': not one of cpu, cuda"),
    "cutoff_layer": (["--cutoff-layer", "3"], "cutoff_layer=3"),
    "no such file": (["nowhere.jsonl"], "nowhere.jsonl: No such file or directory"),
    "a folder": ([str(DATA)], f"{DATA}: Is a directory"),
    "no output": (["--output", ""], "--output '': name a file, or - for standard output"),
    "no such output": (["--output", "nowhere/out"], "nowhere/out: No such file or directory"),
}


@pytest.mark.parametrize(("argv", "why"), ERRORS.values(), ids=ERRORS)
def test_what_cannot_be_used_is_one_line_and_status_2(argv: list[str], why: str) -> None:
    result = rerank(*argv, stdin=GOOD)

    assert (result.status, result.out) == (2, b"")
    assert result.err.startswith("bge-rerank: ")
    assert "<stdin>" not in result.err, "no line of the input is to blame"
    assert why in result.err
    assert result.err.count("\n") == 1


def test_the_input_is_never_overwritten(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(GOOD)

    result = rerank(str(source), "--output", str(tmp_path / "." / "in.jsonl"))

    assert result.status == 2
    assert source.read_bytes() == GOOD


@pytest.mark.parametrize(
    ("argv", "lines"),
    [(["--model", "./nowhere"], GOOD), (["--max-length", "9999"], GOOD), ([], b"no JSON"), (["nowhere.jsonl"], b"")],
)
def test_what_the_output_held_stays_until_there_is_a_line_to_write(
    argv: list[str], lines: bytes, tmp_path: Path
) -> None:
    target = tmp_path / "out.jsonl"
    target.write_text("precious\n")

    assert rerank("--output", str(target), *argv, stdin=lines).status == 2
    assert target.read_text() == "precious\n"


@pytest.mark.parametrize(("lines", "written"), [(b"", 0), (GOOD, 1), (GOOD + b"\nno JSON", 1)])
def test_nothing_of_what_the_output_held_is_left_behind_a_line(lines: bytes, written: int, tmp_path: Path) -> None:
    target = tmp_path / "out.jsonl"
    target.write_text("old\n" * 1000)

    rerank("--output", str(target), stdin=lines)

    assert [json.loads(line)["query"] for line in target.read_text().splitlines()] == [QUERY] * written


@pytest.mark.skipif(os.name == "nt", reason="Windows has no named pipes in folders")
def test_the_output_may_be_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with process("rerank", "--model", ENCODER, "--output", str(tmp_path / "pipe")) as running:
        running.stdin.write(GOOD)  # type: ignore[union-attr]
        running.stdin.close()  # type: ignore[union-attr]
        assert json.loads((tmp_path / "pipe").read_text())["query"] == QUERY
        assert running.wait() == 0


def test_no_passages_no_model() -> None:
    result = bge_rerank("rerank", "--model", "./nowhere", stdin=b'{"query": "a", "passages": []}')

    assert (result.status, result.records[0]["ranking"]) == (0, [])


def test_progress_is_shown_when_asked_for_and_not_where_there_is_no_terminal() -> None:
    assert rerank(stdin=GOOD).err == ""
    assert "1 lines" in rerank("--show-progress", stdin=GOOD).err


def test_a_reader_that_goes_away_ends_it_silently() -> None:
    with process("rerank", "--model", ENCODER) as running:
        assert running.stdin is not None
        assert running.stdout is not None
        assert running.stderr is not None
        running.stdin.write(GOOD + b"\n")
        running.stdin.flush()
        assert running.stdout.readline()
        running.stdout.close()
        running.stdin.write(GOOD + b"\n")
        running.stdin.close()
        assert (running.wait(), running.stderr.read()) == (141, b"")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT between processes")
def test_an_interrupt_ends_it_without_a_traceback() -> None:
    with process("rerank", "--model", ENCODER) as running:
        assert running.stdin is not None
        assert running.stdout is not None
        assert running.stderr is not None
        running.stdin.write(GOOD + b"\n")
        running.stdin.flush()
        assert running.stdout.readline()
        running.send_signal(signal.SIGINT)
        assert (running.wait(), running.stderr.read()) == (130, b"")


@pytest.mark.parametrize("stream", ["stdin", "stdout"])
def test_a_closed_stream_is_named(
    stream: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, stream, None)  # as Python has it after <&- or >&-

    assert main(["rerank", "--model", ENCODER]) == 2
    assert capfd.readouterr().err == f"bge-rerank: standard {stream[3:]}put is closed\n"


# info


def test_info_tells_the_family_and_what_was_chosen_and_why() -> None:
    result = bge_rerank("info", ENCODER, "--device", "cpu")

    facts = {line[: line.index("  ")]: line[line.index("  ") :].strip() for line in result.out.decode().splitlines()}
    assert facts == {
        "model": ENCODER,
        "family": "encoder",
        "architecture": "XLMRobertaForSequenceClassification",
        "layers": "4",
        "hidden size": "48",
        "vocabulary": "1500 tokens",
        "max_length": "512 tokens a pair",
        "device": "cpu (asked for)",
        "dtype": "float32 (the exact choice on cpu)",
    }


def test_info_shows_each_device_of_a_list() -> None:
    out = bge_rerank("info", ENCODER, "--device", "cpu,cpu", "--dtype", "float16").out.decode()

    for number in (1, 2):
        assert f"device {number}      cpu (asked for)" in out
        assert f"dtype {number}       float16 (asked for)" in out


def test_info_refuses_what_loading_would() -> None:
    result = bge_rerank("info", str(DATA / "decoder"), "--dtype", "float16")

    assert result.status == 2
    assert "dtype='float16': Gemma's hidden states overflow in it to NaN; use 'bfloat16' or 'float32'" in result.err


def test_info_does_not_read_the_weights(tmp_path: Path) -> None:
    shutil.copy(DATA / "encoder" / "config.json", tmp_path)

    assert bge_rerank("info", str(tmp_path), "--max-length", "100").out.decode().count("100 tokens a pair") == 1


def test_info_shows_a_name_that_the_terminal_lacks_letters_for(tmp_path: Path) -> None:
    shutil.copytree(ENCODER, tmp_path / "modèle")

    result = bge_rerank("info", str(tmp_path / "modèle"))

    assert (result.status, result.err) == (0, "")
    assert rb"mod\xe8le" in result.out


def test_info_fails_where_loading_would(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["T5Model"], "model_type": "t5"}')

    result = bge_rerank("info", str(tmp_path))

    assert result.status == 2
    assert "T5Model, which is not supported (encoder: " in result.err
    assert bge_rerank("info", ENCODER, "--max-length", "9999").status == 2


# The command itself


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)], ids=["", *COMMANDS])
def test_help_fits_80_columns(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    result = bge_rerank(*command, "--help")

    assert result.status == 0
    assert max(map(len, result.out.decode().splitlines())) <= 80


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_a_flag_with_its_description(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "10000")
    shown = bge_rerank(command, "--help").out.decode()

    settings = {"finetune": FinetuneSettings, "mine": MineSettings}.get(command, RerankSettings)
    assert ("MODEL" in shown) == ("model" in settings.model_fields)  # a flag, or the argument of the command
    for name, field in settings.model_fields.items():
        if name != "model":
            used = name not in UNUSED.get(command, ())
            assert (str(field.description) in shown) == used
            assert (f"  --{name.replace('_', '-')}" in shown) == used


@pytest.mark.parametrize(
    ("command", "flag"),
    [
        (["export-onnx", ENCODER, "made"], "--dtype=bfloat16"),
        (["export-onnx", ENCODER, "made"], "--normalize"),
        (["layers", str(DATA / "layerwise"), "--data", "lines"], "--cutoff-layer=5"),
        (["verify", "BAAI/bge-reranker-v2-m3"], "--normalize"),
    ],
)
def test_an_option_that_would_change_nothing_is_refused_by_name(command: list[str], flag: str) -> None:
    result = bge_rerank(*command, flag)

    assert result.status == 2
    assert f"unrecognized arguments: {flag}" in result.err


@pytest.mark.parametrize("argv", [[], ["nothing"], ["rerank", "--dtype", "int4"], ["rerank", "--norm"], ["info"]])
def test_a_wrong_command_line_is_status_2(argv: list[str]) -> None:
    result = bge_rerank(*argv)

    assert result.status == 2
    assert result.err.startswith("usage: bge-rerank")


def test_version() -> None:
    assert bge_rerank("--version").out.decode() == f"bge-rerank {__version__}\n"


def test_help_needs_no_torch() -> None:
    code = (
        "import sys; from bge_rerank_plugins.cli import main\n"
        "try: main(['rerank', '--help'])\n"
        "except SystemExit: print({'torch', 'transformers', 'rich', 'bm25s'} & set(sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout

    assert out.endswith("set()\n")


def test_python_m_runs_the_command() -> None:
    with process("--version") as running:
        assert running.communicate() == (f"bge-rerank {__version__}\n".encode(), b"")


def test_ctrl_c_while_the_command_is_imported_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted:
        @staticmethod
        def find_spec(name: str, *_: object) -> None:
            if name == "bge_rerank_plugins.cli":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "bge_rerank_plugins.cli")
    monkeypatch.setattr(sys, "meta_path", [Interrupted, *sys.meta_path])
    assert entry_point() == 130


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full")
def test_a_full_disk_is_named() -> None:
    result = rerank("--output", "/dev/full", stdin=GOOD)
    assert (result.status, result.err) == (2, "bge-rerank: No space left on device\n")


@pytest.mark.parametrize("output", ["lines.jsonl", "-"])
def test_standard_input_is_not_overwritten_either(output: str, tmp_path: Path) -> None:
    """Appended to, a file of more lines than are scored at once grew without end."""
    path = tmp_path / "lines.jsonl"
    path.write_text('{"query": "a", "passages": []}\n')
    with path.open("rb") as source, path.open("ab") as sink:
        command = [sys.executable, "-m", "bge_rerank_plugins", "rerank", "--output", output]
        done = subprocess.run(
            command,
            stdin=source,
            stdout=sink,
            stderr=subprocess.PIPE,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(DATA.parents[1])},
            text=True,
            timeout=60,
            check=False,
        )
    assert done.returncode == 2
    assert "that is the input, which would be lost" in done.stderr
    assert path.read_text() == '{"query": "a", "passages": []}\n'
