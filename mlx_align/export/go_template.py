"""Chat templates in Go's template language, which Ollama speaks.

One is found by rendering conversations with the Jinja template and looking at what stands around their
contents. It counts only if it gives the very same text for other conversations, too.
"""

import contextlib
from dataclasses import dataclass

from mlx_align.data.records import Unfit
from mlx_align.data.template import ChatTemplate, text_prefix
from mlx_align.model.load import LoadedModel

# White space that is taken off contents where the Jinja template does so: that of ASCII.
WHITE = " \t\n\v\f\r\x1c\x1d\x1e\x1f"
_WHITE_BYTE = "or (eq $b 32) (and (ge $b 9) (le $b 13)) (and (ge $b 28) (le $b 31))"
# Go's language has no function for that, but templates can call themselves. A text without its first
# byte is as long as the number of its last.
_TRIM = (
    '{{ define "trim" }}{{ if . }}{{ $b := index . 0 }}{{ $last := len (slice . 1) }}'
    f'{{{{ if {_WHITE_BYTE} }}}}{{{{ template "trim" (slice . 1) }}}}'
    "{{ else }}{{ $b = index . $last }}"
    f'{{{{ if {_WHITE_BYTE} }}}}{{{{ template "trim" (slice . 0 $last) }}}}'
    "{{ else }}{{ . }}{{ end }}{{ end }}{{ end }}{{ end }}"
)

# Conversations that must come out the same. Ollama merges neighbours of one role before it renders, so
# there are none here.
_PROBES = (
    (("user", "Hello there"),),
    (("user", "One"), ("assistant", "Two"), ("user", "Three")),
    (("system", "Be brief."), ("user", "Why?")),
    (("system", ""), ("user", "Why?")),
    (("system", "A"), ("user", "b"), ("assistant", "c"), ("user", "d"), ("assistant", "e"), ("user", "f")),
    (("system", "A"), ("user", "b"), ("assistant", "c"), ("system", "D"), ("user", "e")),
    (("user", "a"), ("assistant", "b"), ("system", "C"), ("user", "d")),
    (("system", " \n A\t"), ("user", "\r\nb \v"), ("assistant", "\n c \n"), ("user", "  ")),
    (("user", ""), ("assistant", ""), ("user", "")),
    (("user", "Жж 日本 🦙"), ("assistant", '{{ a }} {% b %} {# c #} "d" \\n'), ("user", "<|im_end|></s>")),
    (("user", "a"), ("assistant", "<think>\nb\n</think>\n\nc"), ("user", "d")),
    (("user", "a"), ("assistant", "<think>b</think>c"), ("user", "d"), ("assistant", "e"), ("user", "f")),
)  # fmt: skip


def derive_go_template(loaded: LoadedModel) -> str | None:
    """The chat template of a model for Ollama; None where there is none, or none that does the same."""
    template = loaded.template
    if template is None or _tells_the_date(template):
        return None
    # Where the tokenizer puts a BOS before a text, Ollama does.
    bos = (loaded.tokenizer.bos_token or "") if text_prefix(loaded.tokenizer) else ""
    try:
        candidates = _find_parts(template, bos)
    except (Unfit, ValueError):
        return None
    return next((parts.go() for parts in candidates if _is_exact(parts, template, bos)), None)


def takes_system(template: ChatTemplate) -> bool:
    """Whether a chat template has a place for a system prompt."""
    return _rendered(template, (("system", "Be brief."), ("user", "Why?"))) is not None


def _render(template, turns, generation=True) -> str:
    messages = [{"role": role, "content": content} for role, content in turns]
    return template.render(messages, generation=generation)


def _rendered(template, turns) -> str | None:
    """None where the template refuses the conversation."""
    try:
        return _render(template, turns)
    except Unfit:
        return None


def _tells_the_date(template) -> bool:
    if template.source is None:
        return False
    other = ChatTemplate(template.source, template.variables, "2001-02-03")
    return any(_rendered(template, turns) != _rendered(other, turns) for turns in _PROBES)


def _is_exact(parts: "_Parts", template, bos: str) -> bool:
    expected = [(turns, _rendered(template, turns)) for turns in _PROBES]
    return all(
        text is None or parts.text(turns) == text.removeprefix(bos) for turns, text in expected
    )


@dataclass(frozen=True)
class _Turn:
    """What a template writes around the content of a role, and whether it trims that."""

    before: str
    after: str
    trimmed: bool

    def text(self, content: str) -> str:
        return self.before + (content.strip(WHITE) if self.trimmed else content) + self.after

    def go(self) -> str:
        content = '{{ template "trim" .Content }}' if self.trimmed else "{{ .Content }}"
        return _literal(self.before) + content + _literal(self.after)


@dataclass(frozen=True)
class _Parts:
    """A template in pieces.

    `start` stands before everything, `default` behind it where no system prompt does, `opening` where
    the answer begins. Some templates take an empty system prompt for none.
    """

    start: str
    default: str
    around: dict[str, _Turn]
    opening: str
    empty_is_none: bool

    def text(self, turns) -> str:
        kept = [turn for turn in turns if turn != ("system", "") or not self.empty_is_none]
        start = self.start + ("" if kept[0][0] == "system" else self.default)
        return start + "".join(self.around[role].text(c) for role, c in kept) + self.opening

    def go(self) -> str:
        is_system = 'eq .Role "system"'
        if self.empty_is_none:
            is_system = f"and ({is_system}) .Content"
        start = _literal(self.start)
        if self.default:
            start += (
                f"{{{{ with index .Messages 0 }}}}{{{{ if not ({is_system}) }}}}"
                f"{_literal(self.default)}{{{{ end }}}}{{{{ end }}}}"
            )
        tests = {
            "system": is_system,
            "user": 'eq .Role "user"',
            "assistant": 'eq .Role "assistant"',
        }
        turns = "{{ else ".join(
            f"if {test} }}}}{self.around[role].go()}" for role, test in tests.items()
        )
        trim = _TRIM if any(turn.trimmed for turn in self.around.values()) else ""
        loop = f"{{{{ range .Messages }}}}{{{{ {turns}{{{{ end }}}}{{{{ end }}}}"
        return trim + start + loop + _literal(self.opening)


def _find_parts(template, bos: str) -> list[_Parts]:
    """What may do the same. Raises `ValueError` where what stands around contents is not constant."""

    def render(*turns, generation=True):
        return _render(template, turns, generation).removeprefix(bos)

    s, u, a, v = "qxsystem", "qxuser", "qxassistant", "qxsecond"
    talk = [("user", u), ("assistant", a), ("user", v)]
    user_end = _split(render(talk[0], generation=False), u)[1]
    opening = _after(_split(render(talk[0]), u)[1], user_end)
    assistant_end = _split(render(*talk[:2], generation=False), a)[1]
    before_user, rest = _split(render(*talk), u)
    between, rest = _split(rest, a)
    assistant_start = _after(between, user_end)
    user_start = _after(_split(rest, v)[0], assistant_end)
    # The first user's turn stands behind what comes when no system prompt is given.
    default = _before(before_user, user_start)
    around = {"user": (user_start, user_end), "assistant": (assistant_start, assistant_end)}
    # Where Jinja refuses system prompts, Ollama's text for one is as good as any.
    start, around["system"] = "", ("", "")
    if takes_system(template):
        within = [*talk[:2], ("system", s), talk[2]]
        talk = [("system", s), *talk]
        system_start, rest = _split(render(*talk), s)
        system_end = _before(_split(rest, u)[0], user_start)
        with contextlib.suppress(Unfit):
            # A later system prompt has nothing before it but its own.
            before_later = _split(_split(render(*within), a)[1], s)[0]
            first, system_start = system_start, _after(before_later, assistant_end)
            start = _before(first, system_start)
        around["system"] = (system_start, system_end)
        default = _after(default, start)

    def trims(role):
        padded = [(r, f" \n{c}\n " if r == role else c) for r, c in talk]
        return render(*padded) == render(*talk)

    turns = {role: _Turn(*around[role], trims(role)) for role in around}
    return [
        _Parts(start, default, turns, opening, empty_is_none) for empty_is_none in (False, True)
    ]


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
    return text.replace("{", '{{ "{" }}')
