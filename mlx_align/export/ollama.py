"""What Ollama needs: a GGUF, and a Modelfile with template, stops and parameters."""

import contextlib
import logging
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from mlx_align.data.records import Unfit
from mlx_align.data.template import end_of_turn
from mlx_align.errors import ExportError, SettingsError
from mlx_align.export.adapter import export_gguf_adapter
from mlx_align.export.gguf import export_gguf
from mlx_align.export.vocabulary import read_vocabulary
from mlx_align.files import new_folder
from mlx_align.model.adapter import Adapter
from mlx_align.model.load import LoadedModel

log = logging.getLogger("mlx_align")

# Ollama takes the built-in template nearest to the file's own, if fewer than 100 letters differ.
# A remark of more letters than that keeps it from taking a wrong one.
GUARD = (
    "{# This template is exact. "
    + "Nothing here is to be replaced by a similar template. " * 2
    + "#}"
)
MODEL_FILE, ADAPTER_FILE = "model.gguf", "adapter.gguf"


def export_ollama(
    loaded: LoadedModel,
    output: Path,
    *,
    quantise: str,
    name: str,
    importance: Mapping[str, np.ndarray] | None = None,
) -> Path:
    """Write a folder with a GGUF and a Modelfile, and create the model where Ollama is installed."""
    go_template = derive_go_template(loaded)
    vocabulary = read_vocabulary(loaded)
    if go_template is None and vocabulary.chat_template:
        log.warning(
            "this chat template cannot be written in Ollama's template language; Ollama uses the one "
            "inside the GGUF (which needs a version of 2026 or later)"
        )
        vocabulary = replace(vocabulary, chat_template=vocabulary.chat_template + GUARD)
    modelfile = write_modelfile(loaded, go_template)
    options = {"quantise": quantise, "importance": importance, "vocabulary": vocabulary}
    with new_folder(output) as folder:
        export_gguf(loaded, folder / MODEL_FILE, **options)
        (folder / "Modelfile").write_text(modelfile, encoding="utf-8")
    create_in_ollama(output, name)
    return output


def export_ollama_adapter(
    loaded: LoadedModel,
    adapter: Adapter,
    output: Path,
    *,
    base_name: str | None,
    quantise: str,
    name: str,
) -> Path:
    """Write a folder with a GGUF adapter and a Modelfile that puts it on a model of Ollama's.

    `base_name` is what Ollama calls the base ("llama3.2:1b"), which must be the model that was trained.
    """
    if not re.fullmatch(r"[\w./:-]+", base_name or ""):
        raise SettingsError(
            f"base_name: {base_name!r} is no name of a model in Ollama; give that of the base, such as "
            "llama3.2:1b"
        )
    go_template = derive_go_template(loaded)
    if go_template is None and loaded.template is not None:
        log.warning(
            "this chat template cannot be written in Ollama's template language; Ollama uses that of %s",
            base_name,
        )
    source = f"{base_name}\nADAPTER ./{ADAPTER_FILE}"
    modelfile = write_modelfile(loaded, go_template, source)
    with new_folder(output) as folder:
        export_gguf_adapter(loaded, adapter, folder / ADAPTER_FILE, quantise=quantise)
        (folder / "Modelfile").write_text(modelfile, encoding="utf-8")
    create_in_ollama(output, name)
    return output


def write_modelfile(
    loaded: LoadedModel, go_template: str | None, source: str = f"./{MODEL_FILE}"
) -> str:
    """The text of the Modelfile; `source` is what comes behind FROM."""
    lines = [f"FROM {source}"]
    if go_template is not None:
        lines.append(f'TEMPLATE """{_quotable(go_template)}"""')
    for stop in stop_texts(loaded):
        lines.append(f'PARAMETER stop "{_escape(stop)}"')
    if loaded.context_length:
        lines.append(f"PARAMETER num_ctx {min(loaded.context_length, 8192)}")
    return "\n".join(lines) + "\n"


def stop_texts(loaded: LoadedModel) -> list[str]:
    """The texts of the tokens that end a completion, and of a turn's end that is no single token."""
    texts = [loaded.tokenizer.decode([i]) for i in sorted(loaded.tokenizer.eos_token_ids)]
    if loaded.template is not None:
        token, text = end_of_turn(loaded.tokenizer, loaded.template)
        if token is None and text:
            texts.append(text)
    return list(dict.fromkeys(t for t in texts if t.strip()))


def derive_go_template(loaded: LoadedModel) -> str | None:
    """The chat template in Go's template language, where that gives the very same text.

    Found by rendering conversations and looking at what stands around the contents. None where the
    result does not reproduce the Jinja template on other conversations.
    """
    template = loaded.template
    if template is None:
        return None
    bos = getattr(loaded.tokenizer, "bos_token", None) or ""

    def render(*turns, generation=True):
        messages = [{"role": role, "content": content} for role, content in turns]
        text = template.render(messages, generation=generation)
        # Ollama adds the BOS itself, as the file's add_bos_token says.
        return text.removeprefix(bos)

    try:
        parts = _parts(render)
    except (Unfit, ValueError):
        return None
    for turns in _PROBES:
        turns = (*turns, ("user", "And then?")) if turns[-1][0] == "assistant" else turns
        try:
            expected = render(*turns)
        except Unfit:
            # A template that takes no system prompt: Ollama's text for one is then as good as any.
            if turns[0][0] == "system":
                continue
            return None
        if parts.text(turns) != expected:
            return None
    return parts.go()


_PROBES = (
    (("user", "Hello there"),),
    (("user", "One"), ("assistant", "Two"), ("user", "Three")),
    (("system", "Be brief."), ("user", "Why?")),
    (
        ("system", "Be kind."),
        ("user", "a b"),
        ("assistant", "c"),
        ("user", "d"),
        ("assistant", "e"),
    ),
)


class _Parts:
    """What a template writes around each role's content."""

    def __init__(self, default, system, user, assistant, opening):
        self.default = default  # before everything, when no system prompt is given
        self.around = {"system": system, "user": user, "assistant": assistant}
        self.opening = opening  # where the answer begins

    def text(self, turns) -> str:
        body = "".join(
            self.around[role][0] + content + self.around[role][1] for role, content in turns
        )
        start = "" if turns[0][0] == "system" else self.default
        return start + body + self.opening

    def go(self) -> str:
        def block(role, content):
            before, after = self.around[role]
            return f"{_literal(before)}{content}{_literal(after)}"

        system = block("system", "{{ .System }}")
        otherwise = f"{{{{ else }}}}{_literal(self.default)}" if self.default else ""
        return (
            f"{{{{ if .System }}}}{system}{otherwise}{{{{ end }}}}"
            "{{ range .Messages }}"
            f'{{{{ if eq .Role "user" }}}}{block("user", "{{ .Content }}")}'
            f'{{{{ else if eq .Role "assistant" }}}}{block("assistant", "{{ .Content }}")}'
            "{{ end }}{{ end }}"
            f"{_literal(self.opening)}"
        )


def _parts(render) -> _Parts:
    """Find what stands around contents. Raises ValueError where it is not constant."""
    u, a, v, s = "qxuser", "qxassistant", "qxsecond", "qxsystem"
    user_end = _split(render(("user", u), generation=False), u)[1]
    opening = _after(_split(render(("user", u)), u)[1], user_end)
    answered = render(("user", u), ("assistant", a), generation=False)
    assistant_end = _split(answered, a)[1]
    before_user, rest = _split(render(("user", u), ("assistant", a), ("user", v)), u)
    between, rest = _split(rest, a)
    assistant_start = _after(between, user_end)
    user_start = _after(_split(rest, v)[0], assistant_end)
    # The first user's turn stands behind what comes when no system prompt is given.
    default = _before(before_user, user_start)
    system = ("", "")
    with contextlib.suppress(Unfit):
        start, middle = _split(render(("system", s), ("user", u)), s)
        system = (start, _before(_split(middle, u)[0], user_start))
    return _Parts(
        default, system, (user_start, user_end), (assistant_start, assistant_end), opening
    )


def _after(text: str, start: str) -> str:
    if not text.startswith(start):
        raise ValueError(f"{start!r} is not always there")
    return text[len(start) :]


def _before(text: str, end: str) -> str:
    if not text.endswith(end):
        raise ValueError(f"{end!r} is not always there")
    return text[: len(text) - len(end)]


def _split(text: str, marker: str) -> tuple[str, str]:
    before, found, after = text.partition(marker)
    if not found or marker in after:
        raise ValueError(f"{marker} does not appear once")
    return before, after


def _literal(text: str) -> str:
    """Text that Go's template language leaves as it is."""
    return text.replace("{{", '{{ "{{" }}')


def _quotable(text: str) -> str:
    if '"""' in text:
        raise ExportError('the chat template contains """, which a Modelfile cannot hold')
    return text


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def create_in_ollama(folder: Path, name: str) -> bool:
    """Run `ollama create` where the program is installed; says what to do where it is not."""
    command = ["ollama", "create", name, "-f", str(folder / "Modelfile")]
    if shutil.which("ollama") is None:
        log.info("ollama is not installed here; where it is, run: %s", " ".join(command))
        return False
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["no reason given"]
        log.warning(
            "ollama could not create the model (%s); when it runs, do: %s",
            reason[0],
            " ".join(command),
        )
        return False
    log.info("ollama has it now: ollama run %s", name)
    return True
