"""A hub on this machine, with files that it may break off, damage or not have."""

import hashlib
import http.server
import threading


class Hub(http.server.ThreadingHTTPServer):
    """`files` by their URLs' paths; `sent` maps a file's content to what is really sent."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.files: dict[str, bytes] = {}
        self.sent = lambda content: content
        self.asked: list[str] = []

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def put(self, repository, revision, name, content):
        self.files[f"/datasets/{repository}/resolve/{revision}/{name}"] = content

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()


class Answer(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        if self.path in self.server.files:
            self.server.asked.append(self.path)
        self.answer(body=True)

    def answer(self, body):
        content = self.server.files.get(self.path)
        if content is None:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        revision = self.path.split("/")[5]
        self.send_header("X-Repo-Commit", revision if len(revision) == 40 else "c" * 40)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(self.server.sent(content))
            self.close_connection = True

    def log_message(self, *_):
        pass
