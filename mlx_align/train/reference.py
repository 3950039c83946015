"""The reference's log-probabilities: computed once before training, kept on disk.

They are kept per token in float32, under a key that names everything they depend on: the content of
the weights, the config, the type and layout they were computed in. Rows are found by the uid of
their example, which is a hash of its ids. So another beta, seed or run finds them again, and a
changed model, tokenizer, template or row does not.
"""

import contextlib
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_align.data.template import Example
from mlx_align.errors import StaleReferenceError
from mlx_align.files import cache_folder, write_json
from mlx_align.model.adapter import Adapter, save_weights
from mlx_align.model.forward import make_batches, token_log_probs
from mlx_align.model.load import LoadedModel
from mlx_align.settings import fingerprint

# Examples a file. Each file is one atomic step, so a killed pass loses at most this much.
PART = 256

LogProbs = dict[str, np.ndarray]


def model_fingerprint(loaded: LoadedModel) -> str:
    """A hash of what a model computes: its weights, byte for byte, and its config.

    Hashes of files are remembered by path, size and time of change, since reading gigabytes takes a
    while.
    """
    memory_file = cache_folder() / "fingerprints.json"
    try:
        memory = json.loads(memory_file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        memory = {}
    hashes = []
    for file in sorted(loaded.path.glob("model*.safetensors")):
        stat = file.stat()
        key = f"{file.resolve()}|{stat.st_size}|{stat.st_mtime_ns}"
        if key not in memory:
            with open(file, "rb") as handle:
                memory[key] = hashlib.file_digest(handle, "sha256").hexdigest()
            memory_file.parent.mkdir(parents=True, exist_ok=True)
            write_json(memory_file, memory)
        hashes.append(memory[key])
    config = {k: v for k, v in loaded.config.items() if not k.startswith("_")}
    return fingerprint({"weights": hashes, "config": config})


def reference_description(loaded: LoadedModel, worn: dict | None = None) -> dict[str, str]:
    """Everything that the reference's log-probabilities depend on besides the examples.

    `worn` are the adapter's arrays where the reference wears one.
    """
    adapter = (
        {}
        if worn is None
        else {"adapter": _digest(*(np.asarray(v.astype(mx.float32)) for v in worn.values()))}
    )
    return {
        **adapter,
        "model": model_fingerprint(loaded),
        "dtype": str(loaded.dtype),
        "layout": loaded.layout,
        "device": str(mx.default_device()),
    }


def reference_log_probs(
    loaded: LoadedModel,
    adapter: Adapter | None,
    examples: Sequence[Example],
    pack_length: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    worn: dict | None = None,
) -> LogProbs:
    """Log-probabilities of all scored tokens of every example under the reference, by uid.

    The reference is the model as it is, with `adapter` taken off where one is given; `worn` are the
    arrays of an adapter that it wears all the same.

    What the cache has is read, the rest is computed and added to it. `progress(done, total)` counts
    examples that had to be computed. Raises `StaleReferenceError` where the cache holds something
    else than its name says.
    """
    description = reference_description(loaded, worn)
    folder = cache_folder() / "reference" / fingerprint(description)
    unique = list({e.uid: e for e in examples}.values())
    known = _read(folder, description, {e.uid: sum(e.scored_lengths) for e in unique})
    # Parts are cut from the whole list, so that an interrupted pass goes on with the same batches.
    parts = [unique[i : i + PART] for i in range(0, len(unique), PART)]
    missing = [[e for e in part if e.uid not in known] for part in parts]
    total, done = sum(map(len, missing)), 0
    for part in filter(None, missing):
        fresh: LogProbs = {}
        for batch in make_batches(loaded, part, pack_length):
            fresh |= _score(loaded, adapter, batch)
            done += len(batch.examples)
            progress(done, total)
        _write(folder, description, fresh)
        known |= fresh
    return known


def _score(loaded, adapter, batch) -> LogProbs:
    with contextlib.nullcontext() if adapter is None or adapter.kind == "full" else adapter.off():
        return batch.by_example_tokens(np.array(token_log_probs(loaded, batch)[0]))


# -- files: uids uint8[n, 16], counts int32[n], logp float32[sum of counts], and a digest of them ----


def _write(folder: Path, description: dict, scores: LogProbs) -> None:
    uids = np.frombuffer(bytes.fromhex("".join(scores)), np.uint8).reshape(-1, 16)
    counts = np.array([len(v) for v in scores.values()], np.int32)
    logp = np.concatenate(list(scores.values()))
    digest = _digest(uids, counts, logp)
    folder.mkdir(parents=True, exist_ok=True)
    save_weights(
        folder / f"{digest}.safetensors",
        {"uids": mx.array(uids), "counts": mx.array(counts), "logp": mx.array(logp)},
        {"digest": digest, "description": json.dumps(description)},
    )


def _read(folder: Path, description: dict, wanted: dict[str, int]) -> LogProbs:
    found: LogProbs = {}
    for file in sorted(folder.glob("[!.]*.safetensors")):
        try:
            arrays, metadata = mx.load(str(file), return_metadata=True)
            uids, counts, logp = (np.array(arrays[k]) for k in ("uids", "counts", "logp"))
        except (RuntimeError, KeyError, ValueError):
            raise StaleReferenceError(
                f"{file}: not a readable reference cache; delete it, and it is computed again"
            ) from None
        if json.loads(metadata.get("description", "{}")) != description:
            raise StaleReferenceError(
                f"{file}: these reference log-probabilities were computed with another model; "
                "delete the file, and they are computed again"
            )
        if _digest(uids, counts, logp) != metadata.get("digest"):
            raise StaleReferenceError(
                f"{file}: its content was changed; delete it, and it is computed again"
            )
        at = 0
        for uid, count in zip(uids, counts.tolist(), strict=True):
            name = uid.tobytes().hex()
            if name in wanted:
                if wanted[name] != count:
                    raise StaleReferenceError(
                        f"{file}: the row of example {name} has another length"
                    )
                found[name] = logp[at : at + count]
            at += count
    return found


def _digest(*arrays: np.ndarray) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
