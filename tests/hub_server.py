"""A server on this machine that speaks as much of the Hugging Face Hub's protocol as reading needs.

Large files (those with a name in `large`) have their SHA-256 as ETag and come from another address,
small ones their hash in Git, as on the Hub itself.
"""

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

import pytest

COMMIT = "c0ffee" * 6 + "c0de"
_LARGE = (".safetensors", ".pth")


def etag(name, content):
    """The hash under which the Hub and its cache keep a file."""
    if name.endswith(_LARGE):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class HubServer:
    """One repository, org/model, with one commit, that is `main` and `v1`.

    files: contents by name. damaged: names of files of which another content is sent. cut: by name,
    after how many bytes a transfer breaks off, once; broken: names of those that break off always.
    status, code: of every answer, if they are set. sent: the commit of the files that are sent, if
    it is not that of the list. ranges: the ranges that were asked for.
    """

    def __init__(self):
        self.files, self.cut, self.ranges = {}, {}, []
        self.damaged, self.broken = set(), set()
        self.status, self.code, self.sent = None, "", COMMIT
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self):
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self._answer(body=False)

    def do_GET(self):
        self._answer(body=True)

    def _answer(self, body):
        path = unquote(self.path.partition("?")[0])
        if self.hub.status:
            return self._send(self.hub.status, {"X-Error-Code": self.hub.code})
        if match := re.fullmatch(r"/cdn/(.+)", path):
            return self._content(match[1], body)
        match = re.fullmatch(
            r"(?:/api/models)?/(\w+/\w+)/(?:revision|resolve)/([^/]+)(?:/(.+))?", path
        )
        repo, revision, name = match.groups()
        if repo != "org/model":
            return self._send(401, {"X-Error-Code": "RepoNotFound"})
        if revision not in ("main", "v1", COMMIT):
            return self._send(404, {"X-Error-Code": "RevisionNotFound"})
        if path.startswith("/api/"):
            siblings = [{"rfilename": name} for name in self.hub.files]
            text = json.dumps({"id": repo, "sha": COMMIT, "siblings": siblings}).encode()
            return self._send(200, {"Content-Length": len(text)}, text)
        if name not in self.hub.files:
            return self._send(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        if not name.endswith(_LARGE):
            return self._content(name, body)
        content = self.hub.files[name]
        return self._send(
            302,
            {
                "Location": f"{self.hub.url}/cdn/{name}",
                "X-Repo-Commit": self.hub.sent,
                "X-Linked-ETag": f'"{etag(name, content)}"',
                "X-Linked-Size": len(content),
            },
        )

    def _content(self, name, body):
        """A file, or the range of it that is asked for."""
        content = self.hub.files[name]
        headers = {"ETag": f'"{etag(name, content)}"', "X-Repo-Commit": self.hub.sent}
        if name in self.hub.damaged:
            content = bytes(255 - byte for byte in content)
        start, status = 0, 200
        if match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            self.hub.ranges.append(match[0])
            start, status = int(match[1]), 206
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        headers["Content-Length"] = len(content) - start
        if not body:
            return self._send(status, headers)
        sent = 0 if name in self.hub.broken else self.hub.cut.pop(name, None)
        return self._send(status, headers, content[start:][:sent])

    def _send(self, status, headers, body=b""):
        self.send_response(status)
        for name, value in {"Content-Length": 0, **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A `HubServer` that huggingface_hub asks in this process, with an empty cache."""
    constants = pytest.importorskip("huggingface_hub.constants")
    server = HubServer()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    template = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    downloads = pytest.importorskip("huggingface_hub.file_download")
    for module in (constants, downloads):  # older versions have a copy there
        monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    # Read on import, which a test of lm_eval may have done with HF_HUB_OFFLINE set.
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("time.sleep", lambda _: None)  # between attempts
    yield server
    server.stop()
