"""From a path or a Hub id to a model that is ready to score, train and generate."""

import contextlib
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_align import demo
from mlx_align.data.template import ChatTemplate, end_of_turn, find_template
from mlx_align.demo import DEMO
from mlx_align.errors import ModelError
from mlx_align.model.config import read_config
from mlx_align.model.files import check_regular, read_json, weight_files
from mlx_align.model.heads import Head, find_head
from mlx_align.settings import Settings, setting

log = logging.getLogger("mlx_align")

STORED = "stored"
DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
# What a model folder consists of; weights in other formats on the Hub are not fetched.
TEXTS = (
    "*.json", "*.py", "tokenizer.model", "*.tiktoken", "*.txt", "*.jinja", "README.md",
    "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip
WEIGHTS = ("model*.safetensors",)
# Letters, digits, other scripts and a long line: what expressions that cut text stumble over.
_PROBE = "Hello, it's 12345. 日本語 🚀\n" + "the quick brown fox, " * 8


@dataclass(frozen=True)
class ModelSettings(Settings):
    """Which model to start from."""

    model: str = setting("demo", "Model folder or Hub id; demo is the tiny model that comes along.")
    dtype: str = setting(
        "auto",
        "Type to compute in. auto: as stored on a GPU, float32 on the CPU, where half precision is slow.",
        choices=("auto", *DTYPES),
    )


@dataclass(eq=False)
class LoadedModel:
    """A model with its tokenizer and what was found out about it.

    `template` is its chat template or None. `layout` says how packs run ("segments", "dense",
    "plain"; see `forward.choose_layout`), `head` is None where the vocabulary head is not understood
    and full logits are used. Generation ends at `tokenizer.eos_token_ids`: the tokenizer's, the
    config's, and the id that ends a turn in the template.
    """

    model: nn.Module
    tokenizer: object
    config: dict
    path: Path
    name: str
    dtype: mx.Dtype
    template: ChatTemplate | None = None
    head: Head | None = None
    layout: str = "plain"

    @property
    def vocabulary(self) -> int:
        """Number of ids the embedding knows."""
        return int(self.config.get("vocab_size") or self.config["text_config"]["vocab_size"])

    @property
    def context_length(self) -> int | None:
        """Longest sequence the model was made for, if its config says so."""
        text = self.config.get("text_config") or self.config
        return text.get("max_position_embeddings")

    @property
    def cache_entries(self) -> int:
        """How many cache objects the model's call expects."""
        make_cache = getattr(self.model, "make_cache", None)
        return len(make_cache()) if make_cache else len(self.model.layers)

    @property
    def quantised(self) -> bool:
        """Whether any weight is stored in fewer bits."""
        kinds = nn.QuantizedLinear | nn.QuantizedEmbedding
        return any(isinstance(m, kinds) or hasattr(m, "bits") for m in self.model.modules())


@dataclass(frozen=True, eq=False)
class LoadedTokenizer:
    """What a model folder says besides its weights; see `LoadedModel`."""

    tokenizer: object
    template: ChatTemplate | None
    config: dict
    path: Path


def resolve_model(name: str | Path, patterns: Sequence[str] = (*TEXTS, *WEIGHTS)) -> Path:
    """The local folder of a model; of one on the Hub that is not here yet, the files of these
    patterns are fetched."""
    if name == DEMO:
        return demo.model_folder()
    path = Path(name).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        raise ModelError(f"{name}: a GGUF file; make a model folder of it: mlx-align import {name}")
    if (path / "adapter_model.safetensors").is_file():
        raise ModelError(f"{name}: an adapter of PEFT; make one of MLX: mlx-align import {name}")
    if path.exists():
        if not (path / "config.json").is_file():
            raise ModelError(f"{name}: not a model folder (it has no config.json)")
        return path
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)):
        raise ModelError(f"{name}: no such model folder (and not a Hub id like owner/name)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        return Path(snapshot_download(str(name), allow_patterns=list(patterns)))
    except RepositoryNotFoundError:
        raise ModelError(
            f"{name}: no such folder here, and no such model on the Hub (a private or gated model "
            "needs: hf auth login)"
        ) from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"{name}: no such folder here, and the Hub could not be asked: {reason}"
        ) from None


def load_model(
    name: str, dtype: str = "auto", chat_template: str | None = None, date: str | None = None
) -> LoadedModel:
    """Load a model and its tokenizer; hooks and layout are `forward.choose_layout`'s business.

    `dtype` is one of `DTYPES`, "auto", or `STORED` to leave the weights as they are. `chat_template`
    takes the place of the tokenizer's own ("chatml" or a file), `date` is what the template takes
    for today. Raises `ModelError` that says what is missing or unsupported.
    """
    path = resolve_model(name)
    text = load_tokenizer(path, chat_template, date)
    model, config = load_weights(path, text.config)
    model.freeze()
    compute = _compute_dtype(model, dtype)
    if dtype != STORED:
        model.set_dtype(compute)
    mx.eval(model.parameters())
    loaded = LoadedModel(model, text.tokenizer, config, path, name, compute, text.template)
    loaded.head = find_head(model)
    if loaded.head is None:
        log.warning(
            "%s: unknown kind of vocabulary head; full logits are used, which costs memory", name
        )
    return loaded


def load_weights(path: Path, config: dict) -> tuple[nn.Module, dict]:
    """The model of a folder with weights that are read when they are used, and its full config."""
    from mlx_lm.utils import load_model

    weight_files(path)
    with _judged(path, "cannot be loaded"):
        return load_model(path, lazy=True, model_config=config)


def load_tokenizer(
    name: str | Path, chat_template: str | None = None, date: str | None = None
) -> LoadedTokenizer:
    """The tokenizer of a model, its template and config; the weights are neither read nor fetched.

    Generation ends at `tokenizer.eos_token_ids`, see `LoadedModel`; the arguments are those of
    `load_model`.
    """
    from mlx_lm.utils import load_tokenizer as load

    path = resolve_model(name, TEXTS)
    for pattern in TEXTS:
        for file in path.glob(pattern):
            check_regular(file)
    config = _read_config(path)
    ends = config.get("eos_token_id")
    if ends is None:
        ends = (config.get("text_config") or {}).get("eos_token_id")
    with _judged(path, "its tokenizer cannot be loaded"):
        tokenizer = load(path, eos_token_ids=ends)
        _cut_as_saved(tokenizer, path)
        # Some damage shows only in use.
        tokenizer.decode(tokenizer.encode(_PROBE))
    template = find_template(tokenizer, chat_template, date)
    if template is not None:
        turn, _ = end_of_turn(tokenizer, template)
        tokenizer.eos_token_ids = {*tokenizer.eos_token_ids, turn} - {None}
    return LoadedTokenizer(tokenizer, template, config, path)


def _cut_as_saved(tokenizer, path: Path) -> None:
    """Let a byte-level tokenizer cut texts as its tokenizer.json says.

    transformers 5 makes some classes (GPT2Tokenizer, which SmolLM 2 names) anew from tokens and merges,
    with cuts of their own. `tokenizer.cut_as_saved` says that this was mended.
    """
    from tokenizers import Tokenizer

    file, backend = path / "tokenizer.json", getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.pre_tokenizer is None or not file.is_file():
        return
    saved = Tokenizer.from_file(str(file)).pre_tokenizer
    byte_level = all("ByteLevel" in repr(cuts) for cuts in (saved, backend.pre_tokenizer))
    if byte_level and saved.pre_tokenize_str(_PROBE) != backend.pre_tokenizer.pre_tokenize_str(
        _PROBE
    ):
        backend.pre_tokenizer = saved
        tokenizer.cut_as_saved = True


@contextlib.contextmanager
def _judged(path: Path, verdict: str) -> Iterator[None]:
    """What other libraries raise over the files of `path` becomes a `ModelError`.

    They do so by any kind of error: tokenizers by bare `Exception`s, and by panics that are not even
    those.
    """
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ModelError(f"{path}: {verdict}: {_first_lines(error)}") from error


def _read_config(path: Path) -> dict:
    config = read_config(path)
    # Generation settings override the config's end tokens, as everywhere else.
    generation = path / "generation_config.json"
    if generation.is_file():
        ends = read_json(generation).get("eos_token_id")
        if ends:
            config["eos_token_id"] = ends
    ends = config.get("eos_token_id")
    ids = ends if isinstance(ends, list) else [ends]
    if not all(id_ is None or type(id_) is int for id_ in ids):
        raise ModelError(
            f"{path}: its eos_token_id is {ends!r:.80}, not the id of a token or a list"
        )
    return config


def _compute_dtype(model, choice) -> mx.Dtype:
    if choice in DTYPES:
        return DTYPES[choice]
    if choice == "auto" and mx.default_device() == mx.cpu:
        return mx.float32
    sizes: dict = {}
    for _, array in tree_flatten(model.parameters()):
        if mx.issubdtype(array.dtype, mx.floating):
            sizes[array.dtype] = sizes.get(array.dtype, 0) + array.size
    return max(sizes, key=sizes.get)


def _first_lines(error) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:3]) or type(error).__name__
