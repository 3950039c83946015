"""Text to token ids: chat templates, the exact boundary between prompt and completion, truncation.

    record  {"prompt": "Hi", "chosen": "Yes", "rejected": "No"}
    render  <|user|>Hi<|end|><|assistant|>   Yes<|end|>   No<|end|>
    Example prompt = [u, Hi, e, a]   completions = ([Yes, e], [No, e])   scored = ([1, 1], [1, 1])

A conversation is rendered once and cut where generation would begin, so that training sees the very
ids that generation will see. Knows nothing of models, losses or batches.
"""

import dataclasses
import datetime
import hashlib
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mlx_align.data.records import (
    ChatRecord,
    CompletionRecord,
    JudgedPairRecord,
    LabelRecord,
    Message,
    PairRecord,
    PromptRecord,
    Record,
    Text,
    TextRecord,
    Unfit,
    is_transcript,
    parse_transcript,
)
from mlx_align.errors import DataError

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True, eq=False)
class Example:
    """A prompt with K completions, as token ids.

    `prompt` is int32[P] with P >= 1, `completions` are int32[C_k], `scored` are bool[C_k]: the
    tokens that count. `uid` is a hash of all of these: equal content, equal uid. `values` says how
    good each completion is, where the data knows (a label 1 or 0, a reward; of a pair only the
    difference counts, its margin), `weight` how much the example counts. A prompt that is yet to be
    answered has no completions, its data row in `row`, and what was asked, as text or messages, in
    `asked`. `whole` marks plain text, whose prompt is nothing but its first token.
    """

    uid: str
    prompt: np.ndarray
    completions: tuple[np.ndarray, ...]
    scored: tuple[np.ndarray, ...]
    origin: str
    values: tuple[float, ...] = ()
    weight: float = 1.0
    row: dict | None = None
    asked: Text | None = None
    whole: bool = False

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each completion together with the prompt."""
        return tuple(len(self.prompt) + len(c) for c in self.completions)

    @property
    def scored_lengths(self) -> tuple[int, ...]:
        """Tokens of each completion that count."""
        return tuple(int(mask.sum()) for mask in self.scored)

    @property
    def packed_length(self) -> int:
        """Tokens when the prompt is computed once."""
        return len(self.prompt) + sum(len(c) for c in self.completions)


def make_example(prompt, completions, scored, origin, values=(), weight=1.0) -> Example:
    """An `Example` from lists of ids and masks."""
    prompt = np.asarray(prompt, np.int32)
    completions = tuple(np.asarray(c, np.int32) for c in completions)
    scored = tuple(np.asarray(s, bool) for s in scored)
    digest = hashlib.blake2b(digest_size=16)
    for array in (prompt, *completions, *scored):
        digest.update(np.int64(array.size).tobytes() + array.tobytes())
    return Example(digest.hexdigest(), prompt, completions, scored, origin, tuple(values), weight)


# -- chat templates --------------------------------------------------------------------------------


class ChatTemplate:
    """A Jinja chat template, rendered as Hugging Face renders it, on a date that can be fixed.

    Templates may print today's date (Llama 3.1 does): a run that is resumed after midnight must
    still see the ids it began with, so the date is an argument, not the clock.
    """

    def __init__(self, source: str, variables: dict | None = None, date: str | None = None):
        import jinja2

        from mlx_align.data.sandbox import OutOfBounds, Sandbox

        if not isinstance(source, str):
            raise DataError(f"the chat template is no text but {type(source).__name__}")
        self.source = source
        self.date = date or datetime.date.today().isoformat()
        self.variables = dict(variables or {})
        self._sandbox = Sandbox(datetime.datetime.fromisoformat(self.date))
        try:
            self._template = self._sandbox.compile_template(source)
        except (jinja2.exceptions.TemplateSyntaxError, SyntaxError) as error:
            raise DataError(f"the chat template is not valid Jinja: {error}") from None
        except OutOfBounds as error:
            raise DataError(f"the chat template {error}") from None
        except (RecursionError, MemoryError):
            raise DataError("the chat template is nested too deep to be read") from None

    def with_thinking(self, thinking: bool) -> "ChatTemplate":
        """The same with its thinking mode on or off, here and wherever its `source` is rendered."""
        fixed = ChatTemplate(
            self.source, {**self.variables, "enable_thinking": thinking}, self.date
        )
        # Other programs turn the mode on by default, so it is set whatever they say.
        fixed.source = f"{{% set enable_thinking = {str(thinking).lower()} %}}\n{self.source}"
        return fixed

    def render(self, messages, *, generation: bool, tools=None, arguments=()) -> str:
        """The text of a conversation; with `generation`, up to where the assistant begins.

        Raises `Unfit` where the template refuses the conversation, `DataError` where it would not end.
        """
        import jinja2

        from mlx_align.data.sandbox import OutOfBounds

        try:
            text = self._sandbox.render(
                self._template,
                messages=[dict(m) for m in messages],
                tools=list(tools) if tools else None,
                documents=None,
                add_generation_prompt=generation,
                **{**self.variables, **dict(arguments)},
            )
            text.encode()  # halves of a character, which no tokenizer takes, are a ValueError
            return text
        except OutOfBounds as error:
            raise DataError(
                f"the chat template {error}: it is broken or hostile; give another with --chat-template"
            ) from None
        except (
            jinja2.exceptions.TemplateError, ArithmeticError, AttributeError, LookupError, TypeError,
            ValueError,
        ) as error:  # fmt: skip
            raise Unfit(f"the chat template refuses it: {error}") from None


class CustomTemplate:
    """A renderer that a tokenizer brings as code, behind the interface of `ChatTemplate`."""

    source = None

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self.date = datetime.date.today().isoformat()

    def render(self, messages, *, generation: bool, tools=None, arguments=()) -> str:
        try:
            return self._tokenizer.apply_chat_template(
                [dict(m) for m in messages],
                tools=list(tools) if tools else None,
                add_generation_prompt=generation,
                tokenize=False,
                **dict(arguments),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise Unfit(f"the chat template refuses it: {error}") from None


def find_template(tokenizer, choice: str | None = None, date: str | None = None):
    """The chat template to use, or None where there is none.

    `choice` is None for the tokenizer's own, "chatml", or the path of a Jinja file.
    """
    variables = {
        name: getattr(tokenizer, name, None) or ""
        for name in ("bos_token", "eos_token", "unk_token", "pad_token")
    }
    if choice == "chatml":
        return ChatTemplate(CHATML, variables, date)
    if choice is not None:
        path = Path(choice).expanduser()
        if not path.is_file():
            raise DataError(f"chat template {choice}: no such file (and not 'chatml')")
        return ChatTemplate(path.read_text(encoding="utf-8"), variables, date)
    source = getattr(tokenizer, "chat_template", None)
    if isinstance(source, dict):
        source = source.get("default") or next(iter(source.values()), None)
    if source:
        return ChatTemplate(source, variables, date)
    if getattr(tokenizer, "has_chat_template", False):
        return CustomTemplate(tokenizer)
    return None


def end_of_turn(tokenizer, template) -> tuple[int | None, str]:
    """The id with which the template ends an assistant turn (None if it is not one id), and its text.

    Found by rendering a turn and looking at what follows the answer.
    """
    marker = "zqxvj"
    try:
        turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": marker}]
        tail = template.render(turns, generation=False).rpartition(marker)[2]
    except Unfit:
        return None, ""
    specials = added_tokens(tokenizer)
    for token in tokenizer.encode(tail, add_special_tokens=False):
        if token in specials:
            return token, specials[token]
        if tokenizer.decode([token]).strip():
            break
    return None, tail.strip()


def added_tokens(tokenizer) -> dict[int, str]:
    """Id to text of the tokens that were added to the vocabulary by hand (the special ones)."""
    decoder = getattr(tokenizer, "added_tokens_decoder", None) or {}
    return {int(i): getattr(t, "content", str(t)) for i, t in decoder.items()}


# -- records to examples ---------------------------------------------------------------------------


class Encoder:
    """Turns records into examples with one tokenizer, one template and one length limit.

    `counts` tells how often something had to be changed: rows truncated, boundaries that a joint
    tokenisation would have merged, conversations split because the template rewrites earlier turns.
    Without `truncate` a row that is too long is left out instead of cut.
    """

    def __init__(
        self,
        tokenizer,
        *,
        max_length: int,
        template=None,
        prompt_format: str = "auto",
        thinking: bool | None = None,
        truncate: bool = True,
    ):
        self.tokenizer = tokenizer
        self.template = template
        self.max_length = max_length
        self.truncate = truncate
        self.prompt_format = prompt_format
        self.arguments = () if thinking is None else (("enable_thinking", thinking),)
        self.counts: Counter[str] = Counter()
        self.prefix = text_prefix(tokenizer)
        self.stops = set(getattr(tokenizer, "eos_token_ids", None) or ())
        self.eos = getattr(tokenizer, "eos_token_id", None)
        if template is not None:
            turn, _ = end_of_turn(tokenizer, template)
            self.stops |= {turn} - {None}
        self._special_texts = tuple(t for t in added_tokens(tokenizer).values() if len(t) > 2)
        anchor = self._ids("\n")
        self._anchor = "\n" if self._ids("\na")[len(anchor) :] != self._ids("a") else ""

    # Every public path ends in `_limit`, which applies the length limit and drops hopeless rows.

    def examples(self, record: Record) -> list[Example]:
        """The examples of one record, usually one. Raises `Unfit` for a row to be left out."""
        match record:
            case JudgedPairRecord():
                return [self._pair(record, (record.chosen, record.rejected), (1.0, 0.0))]
            case PairRecord():
                margin = () if record.margin is None else (record.margin, 0.0)
                return [self._pair(record, (record.chosen, record.rejected), margin)]
            case LabelRecord():
                return [self._pair(record, (record.completion,), (float(record.label),))]
            case CompletionRecord():
                return [self._pair(record, (record.completion,))]
            case PromptRecord():
                return [self._prompt(record)]
            case ChatRecord():
                return self._chat(record)
            case TextRecord():
                return [self._text(record)]

    def prompt_ids(self, prompt: Text, tools=None, arguments=()) -> list[int]:
        """The ids that generation starts from, for a prompt as text or messages."""
        turns = self._as_turns(prompt)
        if turns is None:
            return self.prefix + self._ids(prompt)
        return self._ids(self._render_prompt(turns, tools, arguments))

    def _prompt(self, record):
        ids = self.prompt_ids(record.prompt, record.tools, record.template_args)
        if not ids:
            raise Unfit("empty prompt")
        if len(ids) > self.max_length:
            raise Unfit(f"prompt longer than the limit of {self.max_length} tokens")
        example = make_example(ids, (), (), record.origin, (), record.weight)
        return dataclasses.replace(example, row=record.row, asked=record.prompt)

    def _text(self, record):
        ids = self.prefix + self._ids(record.text)
        self._append_eos(ids)
        if len(ids) < 2:
            raise Unfit("a text of one token")
        start = max(len(self.prefix), 1)
        made = self._limit(ids[:start], [ids[start:]], [None], record)
        return dataclasses.replace(made, whole=True)

    def _pair(self, record, completions, values=()):
        turns = self._as_turns(record.prompt)
        if turns is None:
            prompt_text, texts = record.prompt, completions
            if not all(isinstance(t, str) for t in texts):
                self._needs_template(record)
        else:
            prompt_text, texts = self._render(turns, completions, record)
        prefix = self.prefix if turns is None else []
        prompt = prefix + self._ids(prompt_text)
        if not prompt:
            raise Unfit("empty prompt")
        tails = [self._tail(prompt[len(prefix) :], prompt_text, text) for text in texts]
        for ids in tails:
            self._append_eos(ids) if turns is None else self._trim(ids)
        return self._limit(prompt, tails, [None] * len(tails), record, values)

    def _chat(self, record):
        if self.template is None:
            self._needs_template(record)
        turns = [i for i, m in enumerate(record.messages) if m["role"] == "assistant"]
        if not turns or turns[-1] == 0:
            raise Unfit("no assistant turn")
        turns = [i for i in turns if i > 0]
        try:
            text, cuts = self._spans(record, turns)
        except _Rewritten:
            self.counts["conversations split by turn (the template rewrites earlier turns)"] += 1
            return [
                self._pair(
                    CompletionRecord(
                        record.messages[:i],
                        record.messages[i : i + 1],
                        record.origin,
                        record.tools,
                        record.template_args,
                        record.weight,
                    ),
                    (record.messages[i : i + 1],),
                )
                for i in turns
            ]
        ids, bounds = self._cut(text, cuts)
        scored = np.zeros(len(ids), bool)
        for start, end in zip(bounds[0::2], bounds[1::2], strict=True):
            scored[start : start + len(self._trim(ids[start:end]))] = True
        if not scored.any():
            raise Unfit("no assistant turn with text")
        first, last = bounds[0], int(np.flatnonzero(scored)[-1]) + 1
        return [self._limit(ids[:first], [ids[first:last]], [scored[first:last]], record)]

    def _spans(self, record, turns) -> tuple[str, list[int]]:
        """The conversation's text, and begin and end of each assistant turn in it (characters)."""

        def render(messages, generation):
            return self._apply(messages, generation, record.tools, record.template_args)

        text = render(record.messages[: turns[-1] + 1], False)
        cuts = []
        for i in turns:
            opened, closed = (
                render(record.messages[:i], True),
                render(record.messages[: i + 1], False),
            )
            begin = len(os.path.commonprefix([opened, closed]))
            # Opened may promise more than closed keeps ("<think>"), but never lose the question.
            asked = render(record.messages[:i], False).rstrip()
            if not text.startswith(closed) or begin < len(asked) or (cuts and begin < cuts[-1]):
                raise _Rewritten
            cuts += [begin, len(closed)]
        return text, cuts

    # -- rendering

    def _as_turns(self, prompt: Text) -> tuple[Message, ...] | None:
        """The prompt as messages to render, or None where it is to be taken as plain text."""
        if not isinstance(prompt, str):
            if self.template is None:
                raise DataError(self._no_template)
            return prompt
        if self.template is None or self.prompt_format == "text":
            if self.prompt_format == "chat":
                raise DataError(self._no_template)
            return None
        if is_transcript(prompt):
            turns, joined = parse_transcript(prompt)
            self.counts["transcripts with turns of one speaker joined"] += joined
            return turns
        if self.prompt_format == "auto" and any(t in prompt for t in self._special_texts):
            return None
        return ({"role": "user", "content": prompt},)

    _no_template = (
        "the data holds chat messages, but the tokenizer has no chat template; "
        "give one with --chat-template (chatml, or a .jinja file)"
    )

    def _needs_template(self, record):
        raise DataError(f"{record.origin}: {self._no_template}")

    def _apply(self, messages, generation, tools, arguments) -> str:
        arguments = (*self.arguments, *arguments)
        return self.template.render(
            messages, generation=generation, tools=tools, arguments=arguments
        )

    def _render_prompt(self, turns, tools, arguments) -> str:
        """Up to where the assistant begins; an assistant turn at the end is left open."""
        if turns and turns[-1]["role"] == "assistant":
            text = self._apply(turns, False, tools, arguments)
            content = turns[-1]["content"].strip()
            return text[: text.rindex(content) + len(content)]
        return self._apply(turns, True, tools, arguments)

    def _render(self, turns, completions, record) -> tuple[str, list[str]]:
        """The prompt's text and what each completion adds to it."""
        tools, arguments = record.tools, record.template_args
        opened = self._render_prompt(turns, tools, arguments)
        continued = turns and turns[-1]["role"] == "assistant"
        fulls = []
        for completion in completions:
            if isinstance(completion, str):
                completion = ({"role": "assistant", "content": completion.strip()},)
            messages = (*turns, *completion)
            if continued:
                first = {
                    **completion[0],
                    "content": turns[-1]["content"] + completion[0]["content"],
                }
                messages = (*turns[:-1], first, *completion[1:])
            fulls.append(self._apply(messages, False, tools, arguments))
        begin = len(os.path.commonprefix([opened, *fulls]))
        if begin < len(opened):
            # The whole prompt must survive; only what the template opens the answer with may go.
            asked = opened if continued else self._apply(turns, False, tools, arguments)
            if begin < len(asked.rstrip()):
                raise Unfit("the chat template rewrites the prompt once it is answered")
            self.counts["prompts cut where the template rewrites the opening of the answer"] += 1
        return opened[:begin], [full[begin:] for full in fulls]

    # -- tokens

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False)) if text else []

    def _tail(self, prompt_ids, prompt_text, text) -> list[int]:
        """The ids of `text` behind a prompt, with the prompt's ids as generation has them."""
        joint = self._ids(prompt_text + text)
        if joint[: len(prompt_ids)] == prompt_ids:
            return joint[len(prompt_ids) :]
        self.counts["boundaries where a joint tokenisation would differ"] += 1
        ids = self._ids(self._anchor + text)
        # Some tokenizers put a space before every text; behind an anchor they do not.
        anchor = self._ids(self._anchor)
        return ids[len(anchor) :] if ids[: len(anchor)] == anchor else self._ids(text)

    def _cut(self, text, cuts) -> tuple[list[int], list[int]]:
        """The ids of a text, and the token index of each character cut."""
        ids, bounds, previous = [], [], 0
        for cut in cuts:
            ids += (
                self._tail(ids, text[:previous], text[previous:cut])
                if ids
                else self._ids(text[:cut])
            )
            bounds.append(len(ids))
            previous = cut
        return ids, bounds

    def _append_eos(self, ids):
        if self.eos is not None and (not ids or ids[-1] not in self.stops):
            ids.append(self.eos)

    def _trim(self, ids):
        """Cut, in place, the white space that a template puts behind the end-of-turn token."""
        last = max((i for i, t in enumerate(ids) if t in self.stops), default=None)
        if last is not None and not self.tokenizer.decode(ids[last + 1 :]).strip():
            del ids[last + 1 :]
        return ids

    def _limit(self, prompt, completions, scored, record, values=()) -> Example:
        room = self.max_length - len(prompt)
        if room <= 0:
            raise Unfit(f"prompt fills the length limit of {self.max_length} tokens")
        if not self.truncate and any(len(ids) > room for ids in completions):
            raise Unfit(f"longer than the length limit of {self.max_length} tokens")
        cut, masks = [], []
        for ids, mask in zip(completions, scored, strict=True):
            mask = np.ones(len(ids), bool) if mask is None else mask
            if len(ids) > room:
                self.counts["completions truncated (their end is not learnt)"] += 1
            cut.append(ids[:room])
            masks.append(mask[:room])
            if not masks[-1].any():
                raise Unfit(f"no scored token within {self.max_length} tokens")
        if len(cut) > 1 and all(np.array_equal(cut[0], other) for other in cut[1:]):
            raise Unfit("chosen equals rejected once tokenised and truncated")
        return make_example(prompt, cut, masks, record.origin, values, record.weight)


class _Rewritten(Exception):
    """The template changes earlier turns when later ones follow."""


def text_prefix(tokenizer) -> list[int]:
    """The ids that the tokenizer itself puts before plain text (BOS, or nothing)."""
    bare = list(tokenizer.encode("a", add_special_tokens=False))
    full = list(tokenizer.encode("a", add_special_tokens=True))
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start]
    return []
