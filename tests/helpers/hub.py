"""A hub on the loopback address: as much of Hugging Face's protocol as it takes.

`python -m tests.helpers.hub [FOLDER]` prints its port; FOLDER/OWNER/NAME are repositories it has.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "a" * 40


class Hub(BaseHTTPRequestHandler):
    """Keeps the files of repositories in memory."""

    files: dict[str, dict[str, bytes]] = {}  # noqa: RUF012 - one for all requests

    def do_POST(self) -> None:
        """Make a repository, or commit files to one."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            owner = asked.get("organization") or "me"
            name = f"{owner}/{asked['name']}"
            self.files.setdefault(name, {})
            self._answer({"url": f"http://{self.headers['Host']}/{name}", "id": name})
            return
        if self.path == "/api/validate-yaml":  # of a model card
            self._answer({"errors": [], "warnings": []})
            return
        repo, what = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(\w+)/main", self.path).groups()
        if what == "preupload":
            found = json.loads(body)["files"]
            modes = [{"path": f["path"], "uploadMode": "regular"} for f in found]
            self._answer({"files": [mode | {"shouldIgnore": False} for mode in modes]})
            return
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                value = entry["value"]
                self.files[repo][value["path"]] = base64.b64decode(value["content"])
        address = f"http://{self.headers['Host']}/{repo}/commit/{COMMIT}"
        self._answer({"commitUrl": address, "commitOid": COMMIT, "commitMessage": "pushed"})

    def do_HEAD(self) -> None:
        """Say what a file is."""
        self._send_file(with_content=False)

    def do_GET(self) -> None:
        """Send a file, or who is asking."""
        if self.path.startswith("/api/"):
            self._answer({"name": "me", "type": "user", "id": "me", "sha": COMMIT, "siblings": []})
        else:
            self._send_file(with_content=True)

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def _answer(self, content: dict) -> None:
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _send_file(self, *, with_content: bool) -> None:
        repo, name = re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", self.path).groups()
        content = self.files.get(repo, {}).get(name)
        self.send_response(404 if content is None else 200)
        if content is None:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", hashlib.sha256(content or b"").hexdigest())
        self.send_header("Content-Length", str(len(content or b"")))
        self.end_headers()
        if with_content and content is not None:
            with suppress(BrokenPipeError):
                self.wfile.write(content)


def repositories(folder: Path) -> dict[str, dict[str, bytes]]:
    """Return the files of the repositories in a folder."""
    found: dict[str, dict[str, bytes]] = {}
    for path in (path for path in folder.rglob("*") if path.is_file()):
        owner, name, *parts = path.relative_to(folder).parts
        found.setdefault(f"{owner}/{name}", {})["/".join(parts)] = path.read_bytes()
    return found


@contextmanager
def serving(folder: Path | None = None) -> Iterator[dict[str, str]]:
    """Run a hub in a process of its own.

    Yields:
        The environment in which huggingface_hub finds it; read as that is imported.
    """
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "tests.helpers.hub", *([str(folder)] if folder else [])]
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) as server:  # noqa: S603
        assert server.stdout
        yield os.environ | {
            "HF_ENDPOINT": f"http://127.0.0.1:{server.stdout.readline().strip()}",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "PYTHONPATH": str(root),
        }
        server.kill()


if __name__ == "__main__":
    Hub.files |= repositories(Path(sys.argv[1])) if len(sys.argv) > 1 else {}
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        print(server.server_port, flush=True)
        with suppress(KeyboardInterrupt):
            server.serve_forever()
    sys.exit()
