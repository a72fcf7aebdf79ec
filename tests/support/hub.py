"""A server on this machine that answers huggingface_hub as the hub does, with the files of folders."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def hub(root: Path) -> Iterator[tuple[str, list[str]]]:
    """Serve the repositories `root/owner/name`; the address, and the paths of all files that were downloaded."""
    downloaded: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def _answer(self, *, body: bool) -> None:
            path = self.path.partition("?")[0]
            if path.startswith("/api/models/"):
                owner, name = path.removeprefix("/api/models/").split("/")[:2]
                self._describe(root / owner / name, f"{owner}/{name}", is_tree="/tree/" in path)
                return
            owner, name, _, revision, file = [*path.lstrip("/").split("/", 4), "", "", "", ""][:5]
            found = root / owner / name / file
            if revision not in ("main", COMMIT) or not found.is_file():
                self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
                return
            data = found.read_bytes()
            if body:
                downloaded.append(file)
            self._send(200, data, {"ETag": f'"{hashlib.sha256(data).hexdigest()}"'}, body=body)

        def _describe(self, folder: Path, name: str, *, is_tree: bool) -> None:
            if not folder.is_dir():
                self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
                return
            paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
            names = [path.relative_to(folder).as_posix() for path in paths]
            data: Any = {"id": name, "sha": COMMIT, "siblings": [{"rfilename": one} for one in names]}
            if is_tree:
                data = [
                    {
                        "type": "file",
                        "path": one,
                        "size": path.stat().st_size,
                        "oid": hashlib.sha1(path.read_bytes()).hexdigest(),
                    }
                    for one, path in zip(names, paths, strict=True)
                ]
            self._send(200, json.dumps(data).encode(), {"Content-Type": "application/json"})

        def _send(self, status: int, data: bytes, headers: dict[str, str], *, body: bool = True) -> None:
            self.send_response(status)
            for key, value in {"X-Repo-Commit": COMMIT, "Content-Length": str(len(data)), **headers}.items():
                self.send_header(key, value)
            self.end_headers()
            if body:
                self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}", downloaded
        finally:
            server.shutdown()
            thread.join()
