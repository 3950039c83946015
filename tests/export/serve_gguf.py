"""A process that serves a GGUF file with llama.cpp; it imports nothing else, to start quickly."""

import os
import sys

import xllamacpp


def serve(path, adapter=None):
    """Load the files, write the address to standard output, and serve until standard input ends."""
    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_ctx = 512
    params.n_parallel = 1
    # Two threads of a tiny model wait for each other most of the time.
    params.cpuparams.n_threads = 1
    params.verbosity = -1
    # Full precision everywhere, so that differences are the file's.
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    if adapter is not None:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(adapter, 1.0)]
    server = xllamacpp.Server(params)
    sys.stdout.write(server.listening_address + "\n")
    sys.stdout.flush()
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    serve(*sys.argv[1:])
