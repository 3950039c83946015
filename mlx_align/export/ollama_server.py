"""Ollama's server: files go up, models are made of them, and they answer."""

import hashlib
import http.client
import ipaddress
import json
import logging
import os
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from mlx_align.errors import ExportError

log = logging.getLogger("mlx_align")

# Seconds to wait for a server that may not be there, and for one that works.
READY_SECONDS, PATIENCE = 5.0, 600.0


class OllamaServer:
    """The server at `address`, which is written as in OLLAMA_HOST; by default that, or the local one.

    Every method raises `ExportError` where the server refuses, breaks off, or says nothing for
    `patience` seconds.
    """

    def __init__(self, address: str | None = None, patience: float = PATIENCE):
        self.url = _url(os.environ.get("OLLAMA_HOST", "") if address is None else address)
        self.patience = patience
        # Proxies are for the internet, not for a server on this machine or next to it.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def runs(self) -> bool:
        """Whether an Ollama answers there."""
        try:
            with self._opener.open(f"{self.url}/api/version", timeout=READY_SECONDS) as response:
                found = json.load(response)
                return isinstance(found, dict) and "version" in found
        except (OSError, http.client.HTTPException, ValueError):
            return False

    def upload(self, path: Path) -> str:
        """Put a file among the server's blobs, unless it is there; returns its digest."""
        with open(path, "rb") as file:
            digest = f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
            if not self._has(digest):
                file.seek(0)
                size = {"Content-Length": str(path.stat().st_size)}
                list(self._lines(f"blobs/{digest}", file, size))
        return digest

    def create(self, request: dict) -> None:
        """Make a model; `request` is that of POST /api/create."""
        status = None
        for row in self._rows("create", request):
            status = row.get("status")
            log.debug("ollama: %s", status)
        if status != "success":
            raise ExportError(
                f"ollama at {self.url} broke off while it made the model, after: {status or 'nothing'}"
            )

    def chat(self, model: str, prompt: str, max_tokens: int) -> tuple[str, str]:
        """What a model says to a prompt without randomness, and why it ended: "stop" or "length"."""
        request = {
            "model": model,
            "messages": [{"role": "user", "content": prompt}],
            "stream": False,
            "options": {"temperature": 0, "num_predict": max_tokens},
        }
        for row in self._rows("chat", request):
            if row.get("done") and isinstance(row.get("message"), dict):
                return row["message"].get("content") or "", row.get("done_reason") or ""
        raise ExportError(f"ollama at {self.url} broke off while {model} answered")

    def _has(self, digest: str) -> bool:
        request = urllib.request.Request(f"{self.url}/api/blobs/{digest}", method="HEAD")
        try:
            with self._opener.open(request, timeout=self.patience):
                return True
        except urllib.error.HTTPError as error:
            if error.code == 404:
                return False
            raise self._refusal(error) from None
        except (OSError, http.client.HTTPException) as error:
            raise self._silence(error) from None

    def _rows(self, path: str, request: dict) -> Iterator[dict]:
        """The JSON objects, one a line, of the answer to a request. Raises its {"error"}."""
        kind = {"Content-Type": "application/json"}
        for line in self._lines(path, json.dumps(request).encode(), kind):
            try:
                row = json.loads(line)
            except ValueError:
                raise ExportError(
                    f"ollama at {self.url} broke off in the middle of a line"
                ) from None
            if not isinstance(row, dict):
                raise ExportError(f"what is at {self.url} does not answer as ollama: {line[:80]!r}")
            if "error" in row:
                raise ExportError(f"ollama at {self.url}: {row['error']}")
            yield row

    def _lines(self, path: str, body, headers: dict) -> Iterator[bytes]:
        request = urllib.request.Request(f"{self.url}/api/{path}", body, headers, method="POST")
        try:
            with self._opener.open(request, timeout=self.patience) as response:
                yield from response
        except urllib.error.HTTPError as error:
            raise self._refusal(error) from None
        except (OSError, http.client.HTTPException) as error:
            raise self._silence(error) from None

    def _refusal(self, error: urllib.error.HTTPError) -> ExportError:
        text = ""
        try:
            text = error.read().decode(errors="replace").strip()
            text = json.loads(text)["error"]
        except (OSError, http.client.HTTPException):
            text = error.reason
        except (ValueError, KeyError, TypeError):
            text = text or error.reason
        return ExportError(f"ollama at {self.url} refused with status {error.code}: {text}")

    def _silence(self, error: Exception) -> ExportError:
        error = getattr(error, "reason", error)
        if isinstance(error, TimeoutError):
            return ExportError(f"ollama at {self.url} said nothing for {self.patience:.0f} seconds")
        return ExportError(f"ollama at {self.url} broke off: {error or type(error).__name__}")


def _url(address: str) -> str:
    """The URL for an address as Ollama takes it: [http[s]://][host][:port][/path]."""
    scheme, _, rest = address.strip().strip("\"'").rpartition("://")
    place, _, path = rest.partition("/")
    try:
        host, port = f"[{ipaddress.IPv6Address(place.strip('[]'))}]", ""
    except ValueError:
        found = re.fullmatch(r"(\[[^\]\s]*\]|[^:\s]*)(?::(\d*))?", place, re.ASCII)
        host, port = found.groups("") if found else ("", "none")
    if scheme not in ("", "http", "https") or not f"0{port}".isdigit() or int(f"0{port}") > 65535:
        raise ExportError(
            f"OLLAMA_HOST: {address!r} is no address of a server, such as 127.0.0.1:11434"
        )
    # A server that listens everywhere listens here, too.
    host = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "[::]": "[::1]"}.get(host, host)
    port = port or {"": "11434", "http": "80", "https": "443"}[scheme]
    return f"{scheme or 'http'}://{host}:{port}/{path}".rstrip("/")
