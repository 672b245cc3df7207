"""A hub on this machine, and what of it is in a cache."""

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Hub(ThreadingHTTPServer):
    """Keeps what it was asked for, and with which token.

    Args:
        repositories: What each has, commit by commit; nothing by default. Whenever a file of main was fetched, somebody commits.
        failing: Names of files for which the hub fails, * for all, with the status; 0: the connection breaks before the content.
    """

    def __init__(
        self, repositories: Mapping[str, Sequence[Path]] | None = None, failing: Mapping[str, int] | None = None
    ) -> None:
        super().__init__(("127.0.0.1", 0), Repositories)
        self.failing = failing or {}
        self.asked: list[tuple[str, str | None]] = []
        self._commits = {name: [*commits] for name, commits in (repositories or {}).items()}
        self._main = dict.fromkeys(self._commits, 0)

    def run(self, code: str, home: Path) -> subprocess.CompletedProcess[str]:
        """Python that asks this hub, and keeps what else it keeps in `home`."""
        environment = os.environ | {
            "HF_ENDPOINT": f"http://127.0.0.1:{self.server_port}",
            "NO_PROXY": "127.0.0.1",
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(home),
        }
        threading.Thread(target=self.serve_forever, daemon=True).start()
        try:
            return subprocess.run(
                [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
            )
        finally:
            self.shutdown()

    def found(self, repository: str, revision: str, name: str) -> tuple[str, Path] | None:
        """The commit that a revision is at, and the file that it has there."""
        commits = self._commits.get(repository)
        if commits is None:
            return None
        number = int(revision) if revision.isdecimal() else self._main[repository]
        return f"{number:040}", commits[number] / name

    def commit(self, repository: str) -> None:
        """Moves main on, if there is more."""
        self._main[repository] = min(self._main[repository] + 1, len(self._commits[repository]) - 1)


class Repositories(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        if (content := self._answer()) is not None:
            self.wfile.write(content)
            repository, revision, _ = self._asked()
            if revision == "main":
                self.server.commit(repository)

    def _asked(self) -> tuple[str, str, str]:
        """Repository, revision and file."""
        repository, _, rest = unquote(urlsplit(self.path).path).strip("/").partition("/resolve/")
        revision, _, name = rest.partition("/")
        return repository, revision, name

    def _answer(self) -> bytes | None:
        self.server.asked.append((self.path, self.headers["Authorization"]))
        status = self.server.failing.get(self._asked()[2], self.server.failing.get("*"))
        if status:
            self.send_error(status)
        if status or (status == 0 and self.command == "GET"):
            return None
        found = self.server.found(*self._asked())
        content = found[1].read_bytes() if found is not None and found[1].is_file() else None
        self.send_response(404 if content is None else 200)
        if found is not None:
            self.send_header("X-Repo-Commit", found[0])
            self.send_header("ETag", f'"{found[0]}-{found[1].name}"')
            if content is None:
                self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("Content-Length", str(len(content or b"")))
        self.end_headers()
        return content

    def log_message(self, *_: object) -> None:
        pass


def put_into_cache(cache: Path, repository: str, files: Path) -> None:
    """As if they had been downloaded from the hub."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    (folder / "snapshots").mkdir(parents=True)
    snapshot = folder / "snapshots" / ("0" * 40)
    try:
        snapshot.symlink_to(files, target_is_directory=True)
    except OSError:  # not everybody may make links on Windows
        shutil.copytree(files, snapshot)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0" * 40)
