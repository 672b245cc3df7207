"""Files for a user: what they held is lost only for what takes their place, and what is no file stays what it is."""

import os
import stat
import threading
import time
from pathlib import Path

import pytest

from bge_rerank_plugins.files import check_writable, whole
from bge_rerank_plugins.jsonl import InputError
from bge_rerank_plugins.pictures import check_picture, new_figure, save_picture


def test_a_file_is_written_in_one_move(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with whole(path) as sink:
        sink.write(b"new")
        sink.flush()
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    with pytest.raises(ZeroDivisionError), whole(path) as sink:
        assert sink.write(b"half") / 0
    assert path.read_text() == "new"
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such links")
def test_what_a_link_leads_to_is_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    (tmp_path / "link").symlink_to("file")
    with whole(tmp_path / "link") as sink:
        sink.write(b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_text() == "new"


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such pipes")
def test_a_picture_goes_through_a_pipe_and_leaves_it_there(tmp_path: Path) -> None:
    """A file took its place, and that of a device such as /dev/null too."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()))
    reader.start()
    save_picture(new_figure("plot"), pipe)
    reader.join(timeout=30)
    assert read[0].startswith(b"\x89PNG")
    assert stat.S_ISFIFO(pipe.stat().st_mode)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such paths")
def test_what_a_path_of_no_file_leads_to_is_written() -> None:
    """/dev/stdout, and what a shell makes of >(...): the place that such a link names does not exist."""
    reader, writer = os.pipe()
    path = Path(f"/dev/fd/{writer}")
    try:
        check_writable("--output", str(path))
        with whole(path) as sink:
            sink.write(b"new")
        assert os.read(reader, 9) == b"new"
    finally:
        os.close(reader)
        os.close(writer)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such path")
def test_a_device_may_be_written_where_its_folder_may_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, _: str(path) == os.devnull)  # as it is for all but root
    check_writable("--output", os.devnull)
    with whole(Path(os.devnull)) as sink:
        sink.write(b"new")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes")
@pytest.mark.parametrize("mode", [0o600, 0o664])
def test_who_may_read_a_file_stays_as_it_was(mode: int, tmp_path: Path) -> None:
    """From the first byte on: the part that is written already is no more open than the file."""
    path = tmp_path / "file"
    path.write_text("old")
    path.chmod(mode)
    with whole(path) as sink:
        sink.write(b"new")
        assert {stat.S_IMODE(each.stat().st_mode) for each in tmp_path.iterdir()} == {mode}
    assert path.read_text() == "new"
    assert stat.S_IMODE(path.stat().st_mode) == mode


def test_two_who_write_one_file_leave_one_of_both(tmp_path: Path) -> None:
    """The second one wrote into what the first was writing, and who ended first put the mixture in place."""
    path = tmp_path / "out"
    with whole(path) as first:
        first.write(b"first, begun")
        first.flush()
        with whole(path) as second:
            second.write(b"second")
            second.flush()
        assert path.read_bytes() == b"second"
        first.write(b" and ended")
    assert path.read_bytes() == b"first, begun and ended"
    assert [each.name for each in tmp_path.iterdir()] == ["out"]


def test_what_killed_processes_left_is_removed_after_a_day(tmp_path: Path) -> None:
    path, other = tmp_path / "out[1]", tmp_path / "out[2]"
    with whole(path) as sink:
        (part,) = tmp_path.iterdir()
        sink.write(b"new")
    left = [part.with_name(part.name[: -len("0.part")] + f"{name}.part") for name in ("old", "new")]
    for each in left:
        each.write_bytes(b"half")
    os.utime(left[0], (time.time() - 25 * 3600,) * 2)
    with whole(other) as sink:
        sink.write(b"another")
    assert left[0].exists()
    with whole(path) as sink:
        sink.write(b"newer")
    assert {each.name for each in tmp_path.iterdir()} == {path.name, other.name, left[1].name}


@pytest.mark.skipif(os.name == "nt", reason="Windows limits the whole path")
@pytest.mark.parametrize("letter", ["x", "é"])
def test_a_file_may_have_the_longest_name_there_is(letter: str, tmp_path: Path) -> None:
    path = tmp_path / (letter * (254 // len(letter.encode())))
    with whole(path) as sink:
        sink.write(b"new")
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("name", ["picture.foo", "picture.pgf"])
def test_a_picture_that_could_not_be_drawn_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"{name}: .* is none of .*\.eps, "):
        check_picture("--plot", str(tmp_path / name), "plot")


@pytest.mark.parametrize("suffix", ["", ".png", ".svg", ".PDF", ".eps", ".jpg"])
def test_a_picture_that_is_not_refused_is_drawn(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"picture{suffix}"
    check_picture("--plot", str(path), "plot")
    save_picture(new_figure("plot"), path)
    assert path.stat().st_size > 500
