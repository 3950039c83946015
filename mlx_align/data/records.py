"""What one line of a data file holds, told apart by its keys and checked.

    {"prompt": ..., "chosen": ..., "rejected": ...}   PairRecord   (text or message lists)
    {"chosen": ..., "rejected": ...}                  PairRecord   (the common prompt is inside both)
    {"prompt": ..., "completion": ..., "label": ...}  LabelRecord  (a thumb up or down)
    {"prompt": ..., "completion": ...}                CompletionRecord
    {"messages": [...]}                               ChatRecord
    {"text": ...}                                     TextRecord

The spellings of other tools (ShareGPT, Alpaca, OpenAI's preference files) are brought into these
shapes first, by `data.spellings`. A record still holds text; tokenizers and templates are the business
of `data.template`.

A row that is not of any of these shapes is an error. A row that is, but that nothing can be learnt
from (an empty completion, two prompts that differ), is a `Problem`: it is dropped and counted.
"""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass

from mlx_align.data.spellings import canonical_row
from mlx_align.errors import DataError

Message = dict
Text = str | tuple[Message, ...]

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


class _Whole:
    """What most records are when they are scored as a whole: themselves."""

    def whole(self) -> "Record":
        """The record whose completions are whole answers, where it is a conversation of several."""
        return self


@dataclass(frozen=True)
class PairRecord(_Whole):
    """One prompt, a preferred and a dispreferred completion.

    `margin` says by how much the preferred one is better, where the data knows; `weight` how much
    the row counts.
    """

    prompt: Text
    chosen: Text
    rejected: Text
    origin: str
    tools: tuple | None = None
    template_args: tuple[tuple[str, object], ...] = ()
    weight: float = 1.0
    margin: float | None = None

    def unpaired(self) -> "JudgedPairRecord":
        """The pair as a good and a bad completion of its prompt."""
        return JudgedPairRecord(**vars(self))


@dataclass(frozen=True)
class JudgedPairRecord(PairRecord):
    """A good and a bad completion of one prompt, each judged by itself."""


@dataclass(frozen=True)
class LabelRecord(_Whole):
    """One prompt and a completion judged good or bad."""

    prompt: Text
    completion: Text
    label: bool
    origin: str
    tools: tuple | None = None
    template_args: tuple[tuple[str, object], ...] = ()
    weight: float = 1.0


@dataclass(frozen=True)
class CompletionRecord(_Whole):
    """One prompt and the completion to learn."""

    prompt: Text
    completion: Text
    origin: str
    tools: tuple | None = None
    template_args: tuple[tuple[str, object], ...] = ()
    weight: float = 1.0


@dataclass(frozen=True)
class ChatRecord(_Whole):
    """A conversation whose assistant turns are to be learnt."""

    messages: tuple[Message, ...]
    origin: str
    tools: tuple | None = None
    template_args: tuple[tuple[str, object], ...] = ()
    weight: float = 1.0

    def whole(self) -> "CompletionRecord":
        """The last answer as the completion of everything before it."""
        if len(self.messages) < 2 or self.messages[-1]["role"] != "assistant":
            raise Unfit("a conversation that does not end with an answer")
        rest = (self.origin, self.tools, self.template_args, self.weight)
        return CompletionRecord(self.messages[:-1], self.messages[-1:], *rest)


@dataclass(frozen=True)
class TextRecord(_Whole):
    """Plain text, every token of which is to be learnt."""

    text: str
    origin: str
    weight: float = 1.0


@dataclass(frozen=True)
class PromptRecord:
    """A prompt to be answered, and the row that it came from, for those who judge the answer."""

    prompt: Text
    row: dict
    origin: str
    tools: tuple | None = None
    template_args: tuple[tuple[str, object], ...] = ()
    weight: float = 1.0


Record = PairRecord | LabelRecord | CompletionRecord | ChatRecord | TextRecord | PromptRecord


@dataclass(frozen=True)
class Problem:
    """Why a row is left out: `kind` groups the report, `origin` is "file:line"."""

    kind: str
    origin: str


class Unfit(Exception):
    """Raised inside the data room for a row that is well formed but cannot be learnt from."""

    def __init__(self, kind: str):
        super().__init__(kind)
        self.kind = kind


# -- parsing ---------------------------------------------------------------------------------------


def parse_record(row, origin: str) -> Record:
    """The record that a row (a JSON object) holds.

    Raises `DataError` where the row has none of the known shapes, `Unfit` where it has one but
    teaches nothing.
    """
    if not isinstance(row, Mapping):
        raise DataError(f"{origin}: a row must be a JSON object, not {type(row).__name__}")
    row = canonical_row({k: v for k, v in row.items() if v is not None}, origin)
    if "chosen" in row or "rejected" in row:
        return _pair(row, origin)
    if "label" in row and ("completion" in row or "messages" in row):
        return _label(row, origin)
    if "messages" in row:
        messages = _with_system(_messages(row["messages"], "messages", origin), row)
        return ChatRecord(messages, origin, *_extras(row, origin))
    if "completion" in row:
        prompt = _with_system(_prompt(row, origin), row)
        completion = _completion(row["completion"], "completion", origin)
        return CompletionRecord(prompt, completion, origin, *_extras(row, origin))
    if "text" in row:
        text = row["text"]
        if not isinstance(text, str):
            raise DataError(f'{origin}: "text" must be a string, not {type(text).__name__}')
        if not text.strip():
            raise Unfit("empty text")
        return TextRecord(text, origin, _number(row, "weight", origin, 1.0))
    keys = ", ".join(sorted(map(str, row))) or "nothing"
    raise DataError(
        f"{origin}: no known kind of row (its keys: {keys}). Expected prompt/chosen/rejected, "
        "chosen/rejected, prompt/completion/label, prompt/completion, messages, or text; other names "
        "are told with --field, for example --field completion=answer."
    )


def parse_prompt(row, origin: str) -> PromptRecord:
    """The prompt of a row of any kind: its "prompt", or what comes before the last answer.

    Raises as `parse_record` does.
    """
    if not isinstance(row, Mapping):
        raise DataError(f"{origin}: a row must be a JSON object, not {type(row).__name__}")
    plain = canonical_row({k: v for k, v in row.items() if v is not None}, origin)
    if "prompt" in plain:
        prompt = _with_system(_prompt(plain, origin), plain)
    elif "messages" in plain:
        messages = _with_system(_messages(plain["messages"], "messages", origin), plain)
        prompt = messages[:-1] if messages[-1]["role"] == "assistant" else messages
    elif "chosen" in plain and "rejected" in plain:
        prompt = _pair(plain, origin).prompt
    else:
        keys = ", ".join(sorted(map(str, plain))) or "nothing"
        raise DataError(
            f'{origin}: has no "prompt" and no "messages" (its keys: {keys}); another name is told with '
            "--field, for example --field prompt=question"
        )
    if not prompt or (isinstance(prompt, str) and not prompt.strip()):
        raise Unfit("empty prompt")
    return PromptRecord(prompt, dict(row), origin, *_extras(plain, origin))


def _pair(row, origin) -> PairRecord:
    for key in ("chosen", "rejected"):
        if key not in row:
            raise DataError(
                f'{origin}: "{key}" is missing. A pair needs "chosen" and "rejected" '
                '(and "prompt", unless both contain it).'
            )
    chosen, rejected = row["chosen"], row["rejected"]
    extras = _extras(row, origin)
    if isinstance(chosen, str) and isinstance(rejected, str):
        if "prompt" not in row:
            prompt, chosen, rejected = _split_implicit_text(chosen, rejected)
        else:
            prompt = _prompt(row, origin)
    elif isinstance(chosen, str) or isinstance(rejected, str):
        raise DataError(
            f'{origin}: "chosen" and "rejected" must both be text or both message lists'
        )
    else:
        chosen = _messages(chosen, "chosen", origin)
        rejected = _messages(rejected, "rejected", origin)
        # A whole dialogue in "chosen" wins over a "prompt" column that repeats its first turn.
        if "prompt" not in row or chosen[0]["role"] != "assistant":
            prompt, chosen, rejected = _split_implicit_messages(chosen, rejected)
        else:
            prompt = _prompt(row, origin)
    for name, text in (("chosen", chosen), ("rejected", rejected)):
        if is_empty(text):
            raise Unfit(f"empty {name}")
    if chosen == rejected:
        raise Unfit("chosen equals rejected")
    margin = _number(row, "margin", origin, None)
    return PairRecord(_with_system(prompt, row), chosen, rejected, origin, *extras, margin)


# What people and programs write for a thumb up and a thumb down, in lower case.
_UP = frozenset(
    (
        "true", "1", "1.0", "+1", "up", "thumbs_up", "thumbs up", "thumb_up", "like", "liked", "good",
        "yes", "positive", "desirable", "chosen", "accepted", "correct", "👍",
    )
)  # fmt: skip
_DOWN = frozenset(
    (
        "false", "0", "0.0", "-1", "-1.0", "down", "thumbs_down", "thumbs down", "thumb_down",
        "dislike", "disliked", "bad", "no", "negative", "undesirable", "rejected", "incorrect", "👎",
    )
)  # fmt: skip


def _label(row, origin) -> LabelRecord:
    word = str(row["label"]).strip().lower()
    if word not in _UP | _DOWN:
        raise DataError(
            f'{origin}: "label" is {row["label"]!r}. It must say good or bad: true or false, 1 or 0 (or '
            "-1), up or down, good or bad."
        )
    if "completion" in row:
        prompt = _with_system(_prompt(row, origin), row)
        completion = _completion(row["completion"], "completion", origin)
    else:
        messages = _with_system(_messages(row["messages"], "messages", origin), row)
        if len(messages) < 2 or messages[-1]["role"] != "assistant":
            raise Unfit("labelled messages that do not end with an answer")
        prompt, completion = messages[:-1], messages[-1:]
    return LabelRecord(prompt, completion, word in _UP, origin, *_extras(row, origin))


def _number(row, key, origin, default):
    """A finite number in a column, or the default where there is none. A weight is not negative."""
    if key not in row:
        return default
    value = row[key]
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(value, bool) or not math.isfinite(number) or (key == "weight" and number < 0):
        kind = "a number of at least 0" if key == "weight" else "a number"
        raise DataError(f'{origin}: "{key}" is {value!r}, not {kind}')
    return number


def _split_implicit_text(chosen: str, rejected: str) -> tuple[str, str, str]:
    """Two texts that start with their common prompt, split.

    Transcripts ("\\n\\nHuman: ... \\n\\nAssistant: ...") are cut behind the last assistant marker,
    as Bai et al. 2022 (arXiv:2204.05862) define them; other texts behind the last white space of
    their common prefix, so that no word is cut.
    """
    if ASSISTANT in chosen and ASSISTANT in rejected:
        cut_chosen = chosen.rindex(ASSISTANT) + len(ASSISTANT)
        cut_rejected = rejected.rindex(ASSISTANT) + len(ASSISTANT)
        prompt = chosen[:cut_chosen]
        if not chosen[cut_chosen:].strip():
            raise Unfit("empty chosen")
        if not rejected[cut_rejected:].strip():
            raise Unfit("empty rejected")
        if prompt != rejected[:cut_rejected]:
            raise Unfit("prompts of chosen and rejected differ")
        return prompt, chosen[cut_chosen:], rejected[cut_rejected:]
    if chosen == rejected:
        raise Unfit("chosen equals rejected")
    prefix = os.path.commonprefix([chosen, rejected])
    cut = max((i + 1 for i, c in enumerate(prefix) if c.isspace()), default=0)
    if not prefix[:cut].strip():
        raise Unfit("chosen and rejected share no prompt")
    return prefix[:cut], chosen[cut:], rejected[cut:]


def _split_implicit_messages(chosen, rejected):
    """Two dialogues that differ in their last assistant turn only, split before it."""
    for name, messages in (("chosen", chosen), ("rejected", rejected)):
        if messages[-1]["role"] != "assistant":
            raise Unfit(f"{name} does not end with an assistant turn")
    if chosen[:-1] != rejected[:-1]:
        raise Unfit("prompts of chosen and rejected differ")
    if not chosen[:-1]:
        raise Unfit("no prompt")
    return chosen[:-1], chosen[-1:], rejected[-1:]


def _prompt(row, origin) -> Text:
    if "prompt" not in row:
        raise DataError(f'{origin}: "prompt" is missing')
    prompt = row["prompt"]
    return prompt if isinstance(prompt, str) else _messages(prompt, "prompt", origin)


def _with_system(prompt: Text, row) -> Text:
    """The prompt with the row's `system` column in front, unless it already has a system turn."""
    system = row.get("system")
    if not isinstance(system, str) or not system.strip():
        return prompt
    turns = ({"role": "user", "content": prompt},) if isinstance(prompt, str) else prompt
    return (
        turns if turns[0]["role"] == "system" else ({"role": "system", "content": system}, *turns)
    )


def _completion(value, key, origin) -> Text:
    completion = value if isinstance(value, str) else _messages(value, key, origin)
    if is_empty(completion):
        raise Unfit(f"empty {key}")
    return completion


def _messages(value, key, origin) -> tuple[Message, ...]:
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list | tuple) or not value:
        raise DataError(
            f'{origin}: "{key}" must be text or a list of messages like '
            '{"role": "user", "content": "..."}'
        )
    messages = []
    for i, message in enumerate(value):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise DataError(f'{origin}: "{key}"[{i}] is not a message with a "role"')
        # Columnar files fill absent keys with nulls; templates would take them as given.
        message = {k: v for k, v in message.items() if v is not None}
        content = message.setdefault("content", "")
        if isinstance(content, list):
            parts = [
                part
                for part in content
                if isinstance(part, Mapping) and part.get("type", "text") == "text"
            ]
            if len(parts) != len(content):
                raise DataError(f'{origin}: "{key}"[{i}] has parts that are not text')
            message["content"] = "".join(part.get("text", "") for part in parts)
        elif not isinstance(content, str):
            raise DataError(f'{origin}: the content of "{key}"[{i}] is not text')
        messages.append(message)
    return tuple(messages)


def _extras(row, origin) -> tuple[tuple | None, tuple, float]:
    """The `tools` column (a list, or JSON text of one), `chat_template_kwargs`, and `weight`."""
    tools = row.get("tools")
    if isinstance(tools, str):
        import json

        try:
            tools = json.loads(tools) if tools.strip() else None
        except json.JSONDecodeError:
            raise DataError(f'{origin}: "tools" is not valid JSON') from None
    if tools is not None and not isinstance(tools, list | tuple):
        raise DataError(f'{origin}: "tools" must be a list of tool descriptions')
    arguments = row.get("chat_template_kwargs") or {}
    if not isinstance(arguments, Mapping):
        raise DataError(f'{origin}: "chat_template_kwargs" must be an object')
    weight = _number(row, "weight", origin, 1.0)
    if weight == 0:
        raise Unfit("weight 0")
    return (tuple(tools) if tools else None), tuple(sorted(arguments.items())), weight


def is_empty(text: Text) -> bool:
    """Whether a completion says nothing: no text and no tool call."""
    if isinstance(text, str):
        return not text.strip()
    return not any(m["content"].strip() or m.get("tool_calls") for m in text)


# -- transcripts -----------------------------------------------------------------------------------


def is_transcript(prompt: Text) -> bool:
    """Whether a prompt is written as a "\\n\\nHuman: ... \\n\\nAssistant:" transcript."""
    return (
        isinstance(prompt, str)
        and prompt.lstrip().startswith(HUMAN.strip())
        and prompt.rstrip().endswith(ASSISTANT.strip())
    )


def parse_transcript(text: str) -> tuple[tuple[Message, ...], bool]:
    """The finished turns of a transcript prompt, and whether turns had to be joined.

    Some transcripts hold two assistant turns in a row; most chat templates refuse that, so turns of
    one speaker that follow each other are joined by a blank line.
    """
    turns: list[Message] = []
    joined = False
    body = "\n\n" + text.strip()
    body = body[: body.rindex(ASSISTANT)]
    position = 0
    while position < len(body):
        role, marker = (
            ("user", HUMAN) if body.startswith(HUMAN, position) else ("assistant", ASSISTANT)
        )
        start = position + len(marker)
        ends = [i for i in (body.find(HUMAN, start), body.find(ASSISTANT, start)) if i >= 0]
        position = min(ends, default=len(body))
        content = body[start:position].strip()
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] = f"{turns[-1]['content']}\n\n{content}".strip()
            joined = True
        else:
            turns.append({"role": role, "content": content})
    return tuple(turns), joined
