"""What Ollama needs: a GGUF, and a Modelfile with template, stops and parameters."""

import logging
import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mlx_align.data.template import end_of_turn
from mlx_align.errors import ExportError, SettingsError
from mlx_align.export.adapter import export_gguf_adapter
from mlx_align.export.folder import licence_files
from mlx_align.export.gguf import export_gguf
from mlx_align.export.go_template import derive_go_template, takes_system
from mlx_align.export.ollama_server import OllamaServer
from mlx_align.export.vocabulary import read_vocabulary
from mlx_align.files import new_folder
from mlx_align.model.adapter import Adapter
from mlx_align.model.load import LoadedModel

log = logging.getLogger("mlx_align")

# Ollama takes the built-in template nearest to the file's own, if fewer than 100 letters differ. These
# are letters that no template has, so none of its own is nearer than their number.
GUARD = "{# " + "^" * 120 + " #}"
MODEL_FILE, ADAPTER_FILE, MODELFILE = "model.gguf", "adapter.gguf", "Modelfile"
# A model that was just made has to answer these and stop by itself, within this many tokens.
CHECKS = ("Hello!", "What is the capital of France?", "Name three colours.")
CHECK_TOKENS = 256


@dataclass(frozen=True)
class Modelfile:
    """What Ollama is told of a model; `base` is one of Ollama's that wears the adapter, if any."""

    template: str | None
    stops: tuple[str, ...]
    context: int | None
    system: str | None = None
    licence: str | None = None
    base: str | None = None

    @property
    def file(self) -> str:
        """The name of the GGUF beside it."""
        return MODEL_FILE if self.base is None else ADAPTER_FILE

    @property
    def parameters(self) -> dict:
        """The parameters by Ollama's names."""
        given = {"stop": list(self.stops), "num_ctx": self.context}
        return {name: value for name, value in given.items() if value}

    def text(self) -> str:
        """The file. Raises `ExportError` where it cannot hold a text."""
        lines = [f"FROM {self.base or f'./{MODEL_FILE}'}"]
        if self.base is not None:
            lines.append(f"ADAPTER ./{ADAPTER_FILE}")
        if self.template is not None:
            lines.append(f"TEMPLATE {_quoted(self.template)}")
        lines += [f"PARAMETER stop {_quoted(stop)}" for stop in self.stops]
        if self.context:
            lines.append(f"PARAMETER num_ctx {self.context}")
        if self.system:
            lines.append(f"SYSTEM {_quoted(self.system)}")
        if self.licence:
            lines.append(f"LICENSE {_quoted(self.licence)}")
        return "\n".join(lines) + "\n"

    def request(self, name: str, digest: str) -> dict:
        """The same for POST /api/create, with the digest of the uploaded GGUF."""
        files = {self.file: digest}
        whole = {"files": files} if self.base is None else {"from": self.base, "adapters": files}
        texts = {"template": self.template, "system": self.system, "license": self.licence}
        given = {key: text for key, text in texts.items() if text}
        return {"model": name, **whole, **given, "parameters": self.parameters}


def make_modelfile(
    loaded: LoadedModel, *, system: str | None = None, base_name: str | None = None
) -> Modelfile:
    """What Ollama is to be told of a model, or of an adapter on the model that it calls `base_name`."""
    if system and (loaded.template is None or not takes_system(loaded.template)):
        raise SettingsError("system: the model has no chat template that takes a system prompt")
    template = derive_go_template(loaded)
    if template is None and loaded.template is not None:
        log.warning(
            "this chat template cannot be written in Ollama's template language; Ollama uses %s",
            f"that of {base_name}"
            if base_name
            else "the one inside the GGUF (which needs a version of 2026 or later)",
        )
    context = loaded.context_length and min(loaded.context_length, 8192)
    return Modelfile(
        template, stop_texts(loaded), context, system, read_licence(loaded.path), base_name
    )


def export_ollama(
    loaded: LoadedModel,
    output: Path,
    modelfile: Modelfile,
    *,
    quantise: str,
    importance: Mapping[str, np.ndarray] | None = None,
) -> Path:
    """Write a folder with a GGUF and a Modelfile."""
    vocabulary = read_vocabulary(loaded)
    if modelfile.template is None and vocabulary.chat_template:
        # Jinja drops a last newline, but not one in front of a remark.
        guarded = vocabulary.chat_template.removesuffix("\n") + GUARD
        vocabulary = replace(vocabulary, chat_template=guarded)
    options = {"quantise": quantise, "importance": importance, "vocabulary": vocabulary}
    text = modelfile.text()
    with new_folder(output) as folder:
        export_gguf(loaded, folder / MODEL_FILE, **options)
        (folder / MODELFILE).write_text(text, encoding="utf-8")
    return output


def export_ollama_adapter(
    loaded: LoadedModel, adapter: Adapter, output: Path, modelfile: Modelfile, *, quantise: str
) -> Path:
    """Write a folder with a GGUF adapter and a Modelfile that puts it on a model of Ollama's.

    That is `modelfile.base` ("llama3.2:1b"), which must be the model that was trained.
    """
    text = modelfile.text()
    with new_folder(output) as folder:
        export_gguf_adapter(loaded, adapter, folder / ADAPTER_FILE, quantise=quantise)
        (folder / MODELFILE).write_text(text, encoding="utf-8")
    return output


def check_name(name: str | None, what: str) -> str:
    """A name of a model in Ollama: [host/][namespace/]model[:tag]. Raises `SettingsError`."""
    if not re.fullmatch(r"[A-Za-z0-9][\w./:-]*", name or "", re.ASCII):
        raise SettingsError(
            f"{what}: {name!r} is no name of a model in Ollama, such as llama3.2:1b"
        )
    return name


def stop_texts(loaded: LoadedModel) -> tuple[str, ...]:
    """The texts of the tokens that end a completion, and of a turn's end that is no single token."""
    texts = [loaded.tokenizer.decode([i]) for i in sorted(loaded.tokenizer.eos_token_ids)]
    if loaded.template is not None:
        token, text = end_of_turn(loaded.tokenizer, loaded.template)
        if token is None and text:
            texts.append(text)
    return tuple(dict.fromkeys(t for t in texts if t.strip()))


def read_licence(folder: Path) -> str | None:
    """The text of the licence in a model's folder, without what a Modelfile cannot hold."""
    for file in licence_files(folder):
        text = file.read_text(encoding="utf-8", errors="replace")
        return "".join(c for c in text if _is_kept(c)).strip()
    return None


def _quoted(text: str) -> str:
    """A value as Ollama's parser takes it: it knows no escapes, and reads on to the closing quotes."""
    lost = sorted({f"U+{ord(c):04X}" for c in text if not _is_kept(c)})
    if lost:
        raise ExportError(
            f"a Modelfile cannot hold {', '.join(lost)}, which Ollama leaves out of it and which is in: "
            f"{text[:60]!r}"
        )
    if not re.search(r'["\r\n]', text):
        return f'"{text}"'
    if '"""' in text:
        raise ExportError(f'a Modelfile cannot hold """, which is in: {text[:60]!r}')
    return f'"""{text}"""'


def _is_kept(character: str) -> bool:
    return character.isprintable() or character in "\t\r\n"


def create_in_ollama(folder: Path, modelfile: Modelfile, name: str) -> None:
    """Make the model of an exported folder known to Ollama, where that is here, and try it.

    A running server is asked, else the program is called; where there is neither, what to do is said.
    Raises `ExportError` where the server fails.
    """
    command = ["ollama", "create", name, "-f", str(folder / MODELFILE)]
    try:
        server = OllamaServer()
        if not server.runs():
            _call_program(command, name)
            return
        digest = server.upload(folder / modelfile.file)
        server.create(modelfile.request(name, digest))
        _check_answers(server, name)
    except ExportError as error:
        raise ExportError(
            f"{error}. {folder} is kept; when that is mended, run: {shlex.join(command)}"
        ) from None
    log.info("ollama has it now: ollama run %s", name)


def _check_answers(server: OllamaServer, name: str) -> None:
    """Say where the model does not end its answers."""
    for prompt in CHECKS:
        text, reason = server.chat(name, prompt, CHECK_TOKENS)
        if reason != "stop":
            log.warning(
                "in Ollama %s did not end its answer to %r (%s): %r. If mlx-align generate ends there, a "
                "PARAMETER stop is missing in the Modelfile; else the model has not learnt to end, and "
                "more training or a smaller num_predict helps",
                name,
                prompt,
                reason or "no reason given",
                text[-200:],
            )


def _call_program(command: list[str], name: str) -> None:
    shown = shlex.join(command)
    if shutil.which("ollama") is None:
        log.info("ollama is not here; where it is, run: %s", shown)
        return
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["no reason given"]
        log.warning(
            "ollama could not create the model (%s); when it runs, do: %s", reason[0], shown
        )
    else:
        log.info("ollama has it now: ollama run %s", name)
