"""A hub on this machine that has nothing, and what of it is in a cache."""

import shutil
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Hub(ThreadingHTTPServer):
    """Keeps what it was asked for, and with which token."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Nothing)
        self.asked: list[tuple[str, str | None]] = []

    @property
    def environment(self) -> dict[str, str]:
        """What has a process ask this hub."""
        return {
            "HF_ENDPOINT": f"http://127.0.0.1:{self.server_port}",
            "NO_PROXY": "127.0.0.1",
            "HF_HUB_OFFLINE": "0",
        }


class Nothing(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        self.server.asked.append((self.path, self.headers["Authorization"]))
        self.send_error(404)

    do_HEAD = do_GET

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
