"""A hub on 127.0.0.1 in one page: the two endpoints gain_cl uses, over a folder
``{models,datasets}/ORG/NAME``.

Faults by repository name: ``gated`` 403, ``private`` 401, ``busy`` one 503 per file and listing,
``flipped`` states another SHA-256 than that of the bytes it serves.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

SHA = "0123456789abcdef0123456789abcdef01234567"


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@contextmanager
def serve(root: Path) -> Iterator[tuple[str, list[str]]]:
    """(address, log of requested paths) of a hub that serves ``root`` at revision SHA and branch
    main."""
    log: list[str] = []
    refused: set[str] = set()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *arguments: object) -> None:
            log.append(f"{self.command} {self.path}")

        def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = self.path.split("?")[0].lstrip("/")
            listing = path.startswith("api/")
            parts = path.removeprefix("api/").split("/")
            kind = parts.pop(0) if parts[0] in ("models", "datasets") else "models"
            if len(parts) < 4:
                return self.answer(404)
            org, name, _verb, revision, *rest = parts
            folder = root / kind / org / name
            if name == "gated":
                return self.answer(403, X_Error_Code="GatedRepo", X_Error_Message="terms")
            if name == "private" or not folder.is_dir():
                return self.answer(401, X_Error_Code="RepoNotFound")
            if revision not in (SHA, "main"):
                return self.answer(404, X_Error_Code="RevisionNotFound")
            if name == "busy" and path not in refused:
                refused.add(path)
                return self.answer(503)
            if listing:
                return self.answer(
                    200,
                    json.dumps(self.listing(org, name, folder)).encode(),
                    Content_Type="application/json",
                )
            file = folder / "/".join(rest)
            if not file.is_file():
                return self.answer(404, X_Error_Code="EntryNotFound")
            data = file.read_bytes()
            return self.answer(
                200,
                data,
                ETag=f'"{_digest(data)}"',
                X_Repo_Commit=SHA,
                X_Linked_Size=str(len(data)),
            )

        def listing(self, org: str, name: str, folder: Path) -> dict[str, object]:
            files = []
            for file in sorted(p for p in folder.rglob("*") if p.is_file()):
                data = file.read_bytes()
                digest = "0" * 64 if name == "flipped" else _digest(data)
                lfs = {"sha256": digest, "size": len(data), "pointerSize": 130}
                files.append(
                    {
                        "rfilename": file.relative_to(folder).as_posix(),
                        "size": len(data),
                        "blobId": "0" * 40,
                        "lfs": lfs,
                    }
                )
            return {
                "id": f"{org}/{name}",
                "_id": "0",
                "sha": SHA,
                "private": False,
                "downloads": 0,
                "likes": 0,
                "tags": [],
                "siblings": files,
            }

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", log
    finally:
        server.shutdown()
        server.server_close()
