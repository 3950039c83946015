"""A small server with the contract of Ollama's API, and a reader of Modelfiles with its rules."""

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FakeOllama:
    """On loopback; `fail` names a request ("create", "chat", ...) and what goes wrong with it.

    What can go wrong: a status, "error" (a row of the stream), "die" (the connection ends), "end" (the
    stream ends too soon), "cut" (so does the text of an error), "sleep" (nothing comes), or another
    answer.
    """

    def __init__(self, **fail):
        self.fail = fail
        self.blobs: dict[str, bytes] = {}
        self.models: dict[str, dict] = {}
        self.uploads = 0
        self.said = "stop"
        self.woken = threading.Event()
        handler = type("Handler", (_Handler,), {"ollama": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.address = f"127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self):
        self.woken.set()
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    ollama: FakeOllama

    def log_message(self, *_):
        pass

    def do_GET(self):
        version = json.dumps({"version": "0.0.0"}).encode()
        self.send(200, self.ollama.fail.get("version", version))

    def do_HEAD(self):
        self.send_response(200 if self.path.rpartition("/")[2] in self.ollama.blobs else 404)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        what = self.path.split("/")[2]
        failure = self.ollama.fail.get(what)
        if failure == "die":
            self.close_connection = True
            self.connection.close()
        elif failure == "sleep":
            self.ollama.woken.wait(30)
        elif failure == "cut":
            self.send(500, b"out of", 9)
            self.close_connection = True
        elif isinstance(failure, bytes):
            self.send(200, failure)
        elif isinstance(failure, int):
            self.reply(failure, {"error": "out of luck"})
        elif what == "blobs":
            self.take(self.path.rpartition("/")[2], body)
        else:
            getattr(self, what)(json.loads(body), failure)

    def take(self, digest, body):
        self.ollama.uploads += 1
        if digest != f"sha256:{hashlib.sha256(body).hexdigest()}":
            return self.reply(400, {"error": "digest does not match"})
        self.ollama.blobs[digest] = body
        self.reply(201, None)

    def create(self, request, failure):
        given = {**request.get("files", {}), **request.get("adapters", {})}
        if not given or not set(given.values()) <= self.ollama.blobs.keys():
            return self.reply(400, {"error": "unknown blob"})
        rows = [{"status": "parsing GGUF"}, {"status": "writing manifest"}]
        if failure == "error":
            rows.append({"error": "no space left"})
        elif failure != "end":
            self.ollama.models[request["model"]] = request
            rows.append({"status": "success"})
        self.stream(rows)

    def chat(self, request, failure):
        if request["model"] not in self.ollama.models:
            return self.reply(404, {"error": f"model '{request['model']}' not found"})
        row = {"message": {"role": "assistant", "content": "Hm."}, "done": failure != "end"}
        self.stream([{**row, "done_reason": self.ollama.said}])

    def reply(self, status, row):
        self.send(status, b"" if row is None else json.dumps(row).encode())

    def send(self, status, text, missing=0):
        self.send_response(status)
        self.send_header("Content-Length", str(len(text) + missing))
        self.end_headers()
        self.wfile.write(text)

    def stream(self, rows):
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for line in [json.dumps(row).encode() + b"\n" for row in rows] + [b""]:
            self.wfile.write(f"{len(line):x}\r\n".encode() + line + b"\r\n")


def read_modelfile(text: str) -> list[tuple[str, str]]:
    """The commands of a Modelfile, as Ollama's parser reads them.

    A value goes on over the ends of lines until the quotes that it begins with stand at its end; there
    are no escapes, and what is not printable is dropped.
    """
    text = "".join(c for c in text if c.isprintable() or c in "\t\r\n")
    commands, lines = [], iter(text.splitlines(keepends=True))
    for line in lines:
        name, _, value = line.partition(" ")
        if name == "PARAMETER":
            key, _, value = value.partition(" ")
            name = f"PARAMETER {key}"
        while (found := _unquoted(value.strip())) is None:
            value += next(lines)
        commands.append((name, found))
    return commands


def _unquoted(value: str) -> str | None:
    for quotes in ('"""', '"'):
        if value.startswith(quotes):
            found = re.fullmatch(f"{quotes}(.*){quotes}", value, re.DOTALL)
            return found and found[1]
    return value
