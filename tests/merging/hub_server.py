"""A small hub on loopback: what the real client asks of huggingface.co, over folders on disk.

It speaks the parts of the hub's API that model_info, list_repo_tree, snapshot_download, hf_hub_download and the range
requests for safetensors headers use, with the hub's own headers and error codes.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclass
class Repository:
    """A model. gated: its page is public, its files are not. delay: seconds before every answer."""

    folder: Path
    gated: bool = False
    delay: float = 0.0

    def commit(self) -> str:
        digest = hashlib.sha1()
        for name in self.files():
            digest.update(name.encode() + (self.folder / name).read_bytes())
        return digest.hexdigest()

    def files(self) -> list[str]:
        return sorted(str(path.relative_to(self.folder)) for path in self.folder.rglob("*") if path.is_file())


@dataclass
class Hub:
    """The server. url: for HF_ENDPOINT. requests: "METHOD path range" of every request so far."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    url: str = ""
    server: Any = None

    def __enter__(self) -> Hub:
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def bytes_sent_of(self, name: str) -> list[str]:
        """The requests for the content of a file."""
        return [request for request in self.requests if request.startswith("GET") and name in request]


def client(environment: Mapping[str, str]) -> None:
    """Make this process one that was started with these variables of the hub's client, and no others. For a child."""
    from huggingface_hub import constants

    from fusekit import hub

    for name in [name for name in os.environ if name.startswith(("HF_", "HUGGING"))]:
        del os.environ[name]
    os.environ.update({"HF_HUB_DISABLE_XET": "1", "HF_HUB_ETAG_TIMEOUT": "2", **environment})
    importlib.reload(constants)
    hub.TIMEOUT = float(constants.HF_HUB_ETAG_TIMEOUT)


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path} {self.headers.get('Range', '')}".strip())
        if path.startswith("/api/models/"):
            self._api(path.removeprefix("/api/models/"))
        else:
            self._resolve(path.lstrip("/"))

    def _find(self, name: str) -> Repository | None:
        repository = self.hub.repositories.get(name)
        if repository is None:
            self._error(404, "RepoNotFound", "Repository not found")
        else:
            time.sleep(repository.delay)
        return repository

    def _api(self, rest: str) -> None:
        parts = rest.split("/")
        repository = self._find("/".join(parts[:2]))
        if repository is None:
            return
        commit = repository.commit()
        revision = parts[3] if len(parts) > 3 else "main"
        if revision not in ("main", commit):
            self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        elif len(parts) > 2 and parts[2] == "tree":
            self._send(json.dumps([self._entry(repository, name) for name in repository.files()]).encode())
        else:
            siblings = [
                {"rfilename": name, "size": (repository.folder / name).stat().st_size} for name in repository.files()
            ]
            gated = "manual" if repository.gated else False
            info = {"id": "/".join(parts[:2]), "sha": commit, "gated": gated, "siblings": siblings}
            self._send(json.dumps(info).encode())

    def _entry(self, repository: Repository, name: str) -> dict[str, Any]:
        content = (repository.folder / name).read_bytes()
        entry: dict[str, Any] = {"type": "file", "path": name, "size": len(content), "oid": _etag(content)}
        if name.endswith(".safetensors"):
            sha = hashlib.sha256(content).hexdigest()
            entry["lfs"] = {"oid": sha, "size": len(content), "pointerSize": 134}
        return entry

    def _resolve(self, path: str) -> None:
        parts = path.split("/")
        repository = self._find("/".join(parts[:2]))
        if repository is None:
            return
        name = "/".join(parts[4:])
        if repository.gated:
            self._error(403, "GatedRepo", "Access to model is restricted and you are not in the authorized list.")
        elif parts[3] not in ("main", repository.commit()):
            self._error(404, "RevisionNotFound", "Invalid rev id")
        elif name not in repository.files():
            self._error(404, "EntryNotFound", "Entry not found")
        else:
            content = (repository.folder / name).read_bytes()
            etag = hashlib.sha256(content).hexdigest() if name.endswith(".safetensors") else _etag(content)
            self._send(content, ETag=f'"{etag}"', X_Repo_Commit=repository.commit())

    def _send(self, content: bytes, status: int = 200, **headers: str) -> None:
        wanted = self.headers.get("Range", "")
        if status == 200 and wanted.startswith("bytes="):
            first, last = wanted.removeprefix("bytes=").split("-")
            total = len(content)
            content = content[int(first) : int(last) + 1 if last else None]
            status = 206
            headers["Content-Range"] = f"bytes {first}-{int(first) + len(content) - 1}/{total}"
        self.send_response(status)
        for name, value in {**headers, "Accept-Ranges": "bytes", "Content-Length": str(len(content))}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def _error(self, status: int, code: str, message: str) -> None:
        self._send(b"", status, X_Error_Code=code, X_Error_Message=message)


def _etag(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
