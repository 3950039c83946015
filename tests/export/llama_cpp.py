"""llama.cpp's server, from the xllamacpp package, as an independent reader of GGUF files."""

import ctypes
import importlib.util
import json
import subprocess
import sys
import urllib.request
import weakref
from pathlib import Path

import gguf
import numpy as np
import pytest

SERVER = str(Path(__file__).with_name("serve_gguf.py"))


class Server:
    """A server of one file, and an adapter on it, in a process of its own that is killed: in ours,
    xllamacpp now and then waits for ever when a server goes."""

    def __init__(self, path, adapter=None):
        if importlib.util.find_spec("xllamacpp") is None:
            pytest.skip("GGUF files are run where xllamacpp is installed")
        process = subprocess.Popen(
            [sys.executable, SERVER, *map(str, filter(None, (path, adapter)))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        weakref.finalize(self, _stop, process)
        self._address = next((line.strip() for line in process.stdout if "http" in line), None)
        assert self._address, f"llama.cpp cannot load {path}"

    def post(self, path, body):
        request = urllib.request.Request(
            self._address + path,
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        return json.loads(urllib.request.urlopen(request).read())

    def tokenize(self, text, add_special=False):
        body = {"content": text, "add_special": add_special, "parse_special": True}
        return self.post("/tokenize", body)["tokens"]

    def greedy(self, ids, count):
        body = {"prompt": ids, "n_predict": count, "temperature": 0, "return_tokens": True}
        body["cache_prompt"] = False
        return self.post("/completion", body)

    def next_log_probs(self, ids, count):
        """The `count` most likely next tokens with their log-probabilities."""
        body = {
            "prompt": ids,
            "n_predict": 1,
            "temperature": 0,
            "n_probs": count,
            # The server reports the plain log-probabilities, but only with whole characters.
            "logit_bias": [[self.tokenize("a")[0], 1e6]],
        }
        answer = self.post("/completion", body)["completion_probabilities"][0]
        return {row["id"]: row["logprob"] for row in answer["top_logprobs"]}

    def all_log_probs(self, ids, size):
        """The log-probability of every next token, float64[size]."""
        found = self.next_log_probs(ids, size)
        return np.array([found[token] for token in range(size)])

    def chat_prompt(self, messages):
        return self.post("/apply-template", {"messages": messages})["prompt"]


def _stop(process):
    process.kill()
    process.communicate()


def reference_blocks(values, kind, importance=None):
    """llama.cpp's own blocks of float32[rows, width], uint8[rows, bytes]."""
    xllamacpp = pytest.importorskip(
        "xllamacpp", reason="blocks are compared where xllamacpp is installed"
    )
    library = ctypes.CDLL(str(next(Path(xllamacpp.__file__).parent.glob("xllamacpp*.so"))))
    if not hasattr(library, "ggml_quantize_chunk"):
        pytest.skip("this xllamacpp does not show llama.cpp's quantiser")
    quantise = library.ggml_quantize_chunk
    quantise.restype = ctypes.c_size_t
    quantise.argtypes = [
        ctypes.c_int,
        *[ctypes.c_void_p] * 2,
        *[ctypes.c_int64] * 3,
        ctypes.c_void_p,
    ]
    values = np.ascontiguousarray(values, np.float32)
    rows, width = values.shape
    out = np.empty(gguf.quant_shape_to_byte_shape(values.shape, kind), np.uint8)
    weights = None if importance is None else np.ascontiguousarray(importance, np.float32)
    address = None if weights is None else weights.ctypes.data
    quantise(int(kind), values.ctypes.data, out.ctypes.data, 0, rows, width, address)
    return out
