"""A hub of one folder on this machine: what is uploaded to it is there, and can be downloaded again."""

import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """Answers what huggingface_hub asks for; the server has ``root``, ``token``, and ``asked``.

    What "private" owns is read with the token alone, what "gated" owns by nobody.
    """

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status, body=b"", **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        headers = {"Content-Length": str(len(body)), "Content-Type": "application/json"} | headers
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self):
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        self.server.asked.append(self.path)
        if self.headers.get("Authorization") != f"Bearer {self.server.token}":
            return self.answer(401, {"error": "Invalid credentials"})
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
            (self.server.root / name).mkdir(parents=True, exist_ok=True)
            return self.answer(200, {"url": f"{self.server.address}/{name}"})
        if self.path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            files = json.loads(body)["files"]
            return self.answer(
                200,
                {
                    "files": [
                        {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                        for f in files
                    ]
                },
            )
        if "/commit/" in self.path:
            place = self.server.root / "/".join(self.path.split("/")[3:5])
            for line in body.splitlines():
                item = json.loads(line)
                if item["key"] == "file":
                    file = place / item["value"]["path"]
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_bytes(base64.b64decode(item["value"]["content"]))
            url = f"{self.server.address}/{place.parent.name}/{place.name}/commit/{COMMIT}"
            return self.answer(200, {"commitUrl": url, "commitOid": COMMIT, "success": True})
        return self.answer(404, {"error": "Entry not found"})

    def do_GET(self):
        self.server.asked.append(self.path)
        path = self.path.partition("?")[0]
        parts = path.strip("/").split("/")
        owner = parts[2] if parts[:2] == ["api", "models"] else parts[0]
        if owner == "gated":
            return self.answer(
                403, {"error": "Access to it is restricted"}, X_Error_Code="GatedRepo"
            )
        if (
            owner == "private"
            and self.headers.get("Authorization") != f"Bearer {self.server.token}"
        ):
            return self.answer(401, {"error": "Invalid username or password."})
        if parts[:2] == ["api", "models"]:
            place = self.server.root / "/".join(parts[2:4])
            if not place.is_dir():
                return self.answer(404, {"error": "no"}, X_Error_Code="RepoNotFound")
            names = [str(f.relative_to(place)) for f in place.rglob("*") if f.is_file()]
            if "tree" in parts:
                listed = [
                    {"type": "file", "path": n, "size": (place / n).stat().st_size, "oid": "0" * 40}
                    for n in names
                ]
                return self.answer(200, listed)
            about = {"id": "/".join(parts[2:4]), "sha": COMMIT, "private": False}
            return self.answer(200, about | {"siblings": [{"rfilename": n} for n in names]})
        if "resolve" in parts:
            file = self.server.root / "/".join(parts[:2] + parts[4:])
            if not file.is_file():
                code = "EntryNotFound" if file.parent.is_dir() else "RepoNotFound"
                return self.answer(404, b"", X_Error_Code=code, X_Repo_Commit=COMMIT)
            body = file.read_bytes()
            etag = f'"{hashlib.sha256(body).hexdigest()}"'
            return self.answer(200, body, ETag=etag, X_Repo_Commit=COMMIT)
        return self.answer(404, {"error": "Entry not found"})

    do_HEAD = do_GET


@contextmanager
def fake_hub(root: Path, token: str):
    """The server while it runs; its ``address`` goes into HF_ENDPOINT."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.root, server.token, server.asked = root, token, []
    server.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
