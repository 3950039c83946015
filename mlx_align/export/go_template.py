"""Chat templates in Go's template language, which Ollama speaks.

One is found by rendering conversations with the Jinja template and looking at what stands around their
contents. It counts only if it gives the very same text for other conversations, too.
"""

import os.path
from dataclasses import dataclass, replace

from mlx_align.data.records import Unfit
from mlx_align.data.template import ChatTemplate, text_prefix
from mlx_align.model.load import LoadedModel

# Python's white space, which Jinja takes off contents, by its size in UTF-8.
_WHITE = (
    "".join(map(chr, (*range(9, 14), *range(28, 33)))),
    "\x85\xa0",
    "\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B))),
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
    (("system", "A"), ("assistant", "b"), ("user", "c")),
    (("user", "a"), ("system", "B"), ("user", "c")),
    (("assistant", "a"), ("user", "b")),
    (("user", "\u3000a\xa0"), ("assistant", "\x85b\u2009"), ("user", "\ufeff c\u200b")),
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
        parts = _find_parts(template, bos)
    except (Unfit, ValueError):
        return None
    candidates = (parts, replace(parts, empty_is_none=True))
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
        return self.before + (content.strip() if self.trimmed else content) + self.after

    def go(self) -> str:
        content = '{{ template "trim" .Content }}' if self.trimmed else "{{ .Content }}"
        return _literal(self.before) + content + _literal(self.after)


@dataclass(frozen=True)
class _Parts:
    """A template in pieces.

    `default` stands before everything where no system prompt does, `first` is a system prompt there and
    `later` one elsewhere, None where those are left out. `opening` is where the answer begins. Some
    templates take an empty system prompt for none.
    """

    default: str
    first: _Turn
    later: _Turn | None
    user: _Turn
    assistant: _Turn
    opening: str
    empty_is_none: bool = False

    def text(self, turns) -> str:
        kept = [turn for turn in turns if turn != ("system", "") or not self.empty_is_none]
        of = {"system": self.later, "user": self.user, "assistant": self.assistant}
        around = [of[role] for role, _ in kept]
        if kept[0][0] == "system":
            start, around[0] = "", self.first
        else:
            start = self.default
        texts = (turn.text(c) for turn, (_, c) in zip(around, kept, strict=True) if turn)
        return start + "".join(texts) + self.opening

    def go(self) -> str:
        is_system, default = 'eq .Role "system"', ""
        if self.empty_is_none:
            is_system = f"and ({is_system}) .Content"
        if self.default:
            default = (
                f"{{{{ if eq $i 0 }}}}{{{{ if not ({is_system}) }}}}{_literal(self.default)}"
                "{{ end }}{{ end }}"
            )
        turns = {
            is_system: self.later.go() if self.later else "",
            'eq .Role "user"': self.user.go(),
            'eq .Role "assistant"': self.assistant.go(),
        }
        if self.first != self.later:
            turns = {f"and ({is_system}) (eq $i 0)": self.first.go(), **turns}
        chosen = "{{ else ".join(f"if {test} }}}}{text}" for test, text in turns.items())
        loop = (
            f"{{{{ range $i, $_ := .Messages }}}}{default}{{{{ {chosen}{{{{ end }}}}{{{{ end }}}}"
        )
        return (_trim() if 'template "trim"' in loop else "") + loop + _literal(self.opening)


def _find_parts(template, bos: str) -> _Parts:
    """What may do the same. Raises `ValueError` where what stands around contents is not constant.

    Which of two neighbours writes what stands between their contents shows where a text without an
    opening ends; some templates add to that end, so only what all agree on counts. What stands between
    is the user's as far as it always stands before users.
    """

    def render(*turns, generation=True):
        return _render(template, turns, generation).removeprefix(bos)

    def trims(talk, role):
        padded = [(r, f" \n{c}\n " if r == role else c) for r, c in talk]
        return render(*padded) == render(*talk)

    s, u, a, v = "qxsystem", "qxuser", "qxassistant", "qxsecond"
    talk = [("user", u), ("assistant", a), ("user", v)]
    start, answered, asked, last = _split(render(*talk), u, a, v)
    user_end = _shared(answered, last, _split(render(talk[0], generation=False), u)[-1])
    assistant_end = _shared(asked, _split(render(*talk[:2], generation=False), a)[-1])
    # The first user's turn stands behind what comes when no system prompt is given.
    user_start = _shared_end(asked[len(assistant_end) :], start)
    # Where Jinja refuses system prompts, Ollama's text for one is as good as any.
    first = _Turn("", "", False)
    if takes_system(template):
        opened = [("system", s), *talk]
        before, behind, *_ = _split(render(*opened), s, u, a, v)
        user_start = _shared_end(user_start, behind)
        first = _Turn(before, _before(behind, user_start), trims(opened, "system"))
    assistant_end = _before(asked, user_start)
    later: _Turn | None = first
    # Some take a later one only behind an answer, some only behind a question.
    for end, *before in ((user_end, talk[0]), (assistant_end, *talk[:2])):
        within = [*before, ("system", s), talk[2]]
        text = _rendered(template, within)
        if text is not None and s not in text:
            later = None
        elif text is not None:
            *_, ahead, behind, _ = _split(text, *(content for _, content in within))
            trimmed = trims(within, "system")
            later = _Turn(_after(ahead, end), _before(behind, user_start), trimmed)
    return _Parts(
        default=_before(start, user_start),
        first=first,
        later=later,
        user=_Turn(user_start, user_end, trims(talk, "user")),
        assistant=_Turn(_after(answered, user_end), assistant_end, trims(talk, "assistant")),
        opening=_after(last, user_end),
    )


def _shared(*texts: str) -> str:
    """What all texts begin with."""
    return os.path.commonprefix(texts)


def _shared_end(*texts: str) -> str:
    return _shared(*(text[::-1] for text in texts))[::-1]


def _after(text: str, start: str) -> str:
    if not text.startswith(start):
        raise ValueError(f"{start!r} is not always there")
    return text[len(start) :]


def _before(text: str, end: str) -> str:
    if not text.endswith(end):
        raise ValueError(f"{end!r} is not always there")
    return text[: len(text) - len(end)]


def _split(text: str, *markers: str) -> list[str]:
    """What stands before, between and behind markers that come in this order, once each."""
    parts = []
    for marker in markers:
        before, found, text = text.partition(marker)
        if not found or marker in text:
            raise ValueError(f"{marker} does not appear once")
        parts.append(before)
    return [*parts, text]


def _trim() -> str:
    """The template "trim". Go's language has no function for that, but templates can call themselves.

    A text without its first n bytes is as long as the number of its nth last, which takes the place of
    a subtraction.
    """
    ends = ""
    for size, white in enumerate(_WHITE, 1):
        quoted = " ".join(map(_quoted, white))
        ends += (
            f"{{{{ if ge (len .) {size} }}}}{{{{ $rest = len (slice . {size}) }}}}"
            f"{{{{ if eq (slice . 0 {size}) {quoted} }}}}{{{{ $from = {size} }}}}"
            f"{{{{ else if eq (slice . $rest) {quoted} }}}}{{{{ $to = $rest }}}}{{{{ end }}}}{{{{ end }}}}"
        )
    return (
        '{{ define "trim" }}{{ $from := 0 }}{{ $to := len . }}{{ $rest := 0 }}'
        f"{ends}{{{{ if or $from (ne $to (len .)) }}}}"
        '{{ template "trim" (slice . $from $to) }}{{ else }}{{ . }}{{ end }}{{ end }}'
    )


def _literal(text: str) -> str:
    """Text that Go's template language leaves as it is, and that a Modelfile can hold."""
    return "".join(
        c if c != "{" and (c.isprintable() or c in "\n\t") else f"{{{{ {_quoted(c)} }}}}"
        for c in text
    )


def _quoted(character: str) -> str:
    """A character as Go writes it."""
    return f'"{character}"' if character.isprintable() else f'"\\U{ord(character):08x}"'
