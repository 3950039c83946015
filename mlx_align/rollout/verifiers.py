"""Built-in verifiers: rewards that a few lines of text processing can tell, without a model.

A verifier is one frozen dataclass: its fields are its options, its docstring its help, and calling
it with a completion's text, its data row and its length in tokens gives a number, or None where it
does not apply to the row. What it computes is a plain function of text beside it.
`mlx_align.rollout.rewards` names, weighs and adds them up.
"""

import inspect
import json
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from fractions import Fraction
from pathlib import Path

from mlx_align.errors import SettingsError
from mlx_align.settings import Settings, nearest, setting, value_type


@dataclass(frozen=True)
class Verifier(Settings):
    """Base class: `(text, row, tokens) -> reward or None`."""

    name = ""
    # The option that a value without a name fills: `regex:PATTERN`, `json-schema:FILE`.
    main = None
    # Whether that value is everything behind the colon, commas and equal signs included.
    verbatim = False

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of a data row that it reads."""
        return ()

    def __call__(self, text: str, row: Mapping, tokens: int) -> float | None:
        """The reward of a completion of `tokens` tokens to the prompt of a data row."""
        raise NotImplementedError


VERIFIERS: dict[str, type[Verifier]] = {}


def verifier(name: str, main: str | None = None, verbatim: bool = False) -> Callable:
    """Register a verifier class under the name that users write."""

    def register(cls):
        cls.name, cls.main, cls.verbatim = name, main, verbatim
        VERIFIERS[name] = cls
        return cls

    return register


# -- the answer in a completion --------------------------------------------------------------------


def after_thinking(text: str) -> str:
    """What a completion says behind its last </think>; nothing where it never stopped thinking."""
    _, closed, answer = text.rpartition("</think>")
    if closed:
        return answer
    return "" if text.lstrip().startswith("<think>") else text


@dataclass(frozen=True)
class _Answered(Verifier):
    """Base of verifiers that compare with a column, which holds one right answer or a list of them."""

    column: str = setting("answer", "Column with the right answer, or a list of right answers.")

    @property
    def columns(self):
        return (self.column,)

    def right_answers(self, row) -> list[str]:
        """The row's right answers as text; none where the column is absent or empty."""
        value = row.get(self.column)
        values = value if isinstance(value, list | tuple) else [value]
        return [str(v) for v in values if v is not None and str(v).strip()]


# -- numbers ---------------------------------------------------------------------------------------

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
# A minus behind a digit, a word or a bracket subtracts; an exponent (cm^2) is no number of its own,
# nor is the tail of one.
_NUMBER = re.compile(
    rf"(?<![\d^])(?<!\^\{{)(?<!\d\.)(?P<sign>(?<![\w.)\]}}%])-)?(?:[$€£¥](?P<negative>-)?)?"
    rf"(?:(?P<whole>\d+) (?=\d+ ?/ ?\d))?(?P<number>{_DIGITS})(?: ?/ ?(?P<under>\d+))?"
)
# GSM8K's mark. Markdown's fourth headings look alike ("#### Step 2: ...", "#### 2. Add up").
_MARK = re.compile(
    rf"####[ \t]*(?:\n[ \t]*)?(?:(?:the )?(?:final )?answer(?: is)?[:=]?[ \t]*)?[*_(\[]*"
    rf"(?P<answer>-?[$€£¥]?-?(?:{_DIGITS})[^\n]*)",
    re.IGNORECASE,
)
_NUMBERED_HEADING = re.compile(r"\d+[.):][*_]*\s+[*_]*[^\W\d]")
# No sum has so many digits, and Python refuses to convert a few thousand of them.
_MAX_DIGITS = 100


def final_number(text: str, marked: bool = False) -> Fraction | None:
    """The number that a solution ends with, exact; None where there is none.

    That is the number right behind the last "####", or the last one inside the last \\boxed{},
    whichever mark comes later; without a mark the last number of the text (with `marked`: None).
    Thousands commas, currency and percent signs and trailing dots mean nothing; 1/2, 1 1/2 and
    \\frac{1}{2} are fractions.
    """
    text = _plain_numbers(text)
    mark = _last_mark(text)
    if mark is not None:
        return _value(_NUMBER.match(mark))
    boxed = _last_boxed(text)
    if boxed is None and marked:
        return None
    numbers = list(_NUMBER.finditer(text if boxed is None else boxed))
    return _value(numbers[-1]) if numbers else None


def _plain_numbers(text: str) -> str:
    """LaTeX and typographic spellings of numbers as plain ones."""
    text = text.replace("\u2212", "-").replace("\\$", "$").replace("\\%", "%")
    # 1{,}000, 1\,000 and 1 000 with a non-breaking or thin space.
    text = re.sub(r"(?<=\d)(?:\{,\}|\\[,!]|[\u00a0\u2009\u202f])(?=\d{3})", "", text)
    text = re.sub(r"(?<=\d)\s?(?=\\[dt]?frac\{)", " ", text)
    return re.sub(r"\\[dt]?frac\{\s*(-?[\d.,]+)\s*\}\{\s*(\d+)\s*\}", r"\1/\2", text)


def _last_mark(text):
    """What stands behind the last "####", unless a \\boxed{} follows or it is a heading."""
    marks = [m for m in _MARK.finditer(text) if not _NUMBERED_HEADING.match(m["answer"])]
    if not marks or "\\boxed{" in text[marks[-1].end() :]:
        return None
    return marks[-1]["answer"]


def _last_boxed(text):
    """The content of the last \\boxed{...}, braces inside it balanced; None where there is none."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    start += len("\\boxed{")
    depth = 1
    for i in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0:
            return text[start:i]
    return text[start:]


def _value(match):
    """The value of a match of `_NUMBER`; None where it has none, or too many digits for a sum."""
    if len(match[0]) > _MAX_DIGITS:
        return None
    value = Fraction(match["number"].replace(",", ""))
    if match["under"]:
        if int(match["under"]) == 0:
            return None
        value /= int(match["under"])
    value += int(match["whole"] or 0)
    return -value if match["sign"] or match["negative"] else value


@verifier("gsm8k", main="column")
@dataclass(frozen=True)
class FinalNumber(_Answered):
    """1 where the completion ends with the same number as the row's answer, else 0.

    The number behind the last "####" or inside the last \\boxed{}, or else the last one of the text;
    1,000 and $1000.00 are equal, as are 1/2 and 0.5. Thoughts before </think> do not count. A row
    whose answer holds no number is left out. (Cobbe et al. 2021, arXiv:2110.14168.)
    """

    marked: bool = setting(False, "Accept only a number behind #### or in \\boxed{}.")

    def __call__(self, text, row, tokens):
        right = {final_number(answer) for answer in self.right_answers(row)} - {None}
        if not right:
            return None
        return float(final_number(after_thinking(text), self.marked) in right)


# -- words -----------------------------------------------------------------------------------------


def plain(text: str, case: bool = False) -> str:
    """Text as it is compared: one space between words, no marks around it, lower case unless `case`."""
    text = " ".join(unicodedata.normalize("NFKC", text).split())
    # An answer of nothing but marks stays as it is.
    text = text.strip("\"'`*_.,;:!?“”‘’«» ") or text
    return text if case else text.casefold()


@verifier("exact", main="column")
@dataclass(frozen=True)
class Exact(_Answered):
    """1 where the completion is the row's answer and nothing else, else 0.

    White space, quotes and punctuation around it, and upper and lower case do not matter; thoughts
    before </think> do not count.
    """

    case: bool = setting(False, "Upper and lower case matter.")

    def __call__(self, text, row, tokens):
        right = [plain(answer, self.case) for answer in self.right_answers(row)]
        return float(plain(after_thinking(text), self.case) in right) if right else None


@verifier("contains", main="column")
@dataclass(frozen=True)
class Contains(_Answered):
    """1 where the row's answer stands somewhere in the completion, else 0.

    Compared like `exact`. A model can learn to name many answers: use it with a length limit.
    """

    case: bool = setting(False, "Upper and lower case matter.")
    words: bool = setting(
        True, "Only whole words count; turn off for languages that put no spaces between words."
    )

    def __call__(self, text, row, tokens):
        right = [plain(answer, self.case) for answer in self.right_answers(row)]
        if not right:
            return None
        text = plain(after_thinking(text), self.case)
        edge = r"(?<!\w){}(?!\w)" if self.words else "{}"
        return float(any(re.search(edge.format(re.escape(answer)), text) for answer in right))


@dataclass(frozen=True)
class _Pattern(Verifier):
    """Base of the regular expressions, which are compiled when the verifier is made."""

    pattern: str | None = setting(None, "Regular expression of Python's `re`.")

    def __post_init__(self):
        super().__post_init__()
        if not self.pattern:
            raise SettingsError(f"a pattern is needed, for example {self.name}:\\d+")
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise SettingsError(f"{self.pattern!r} is no regular expression: {error}") from None


@verifier("regex", main="pattern", verbatim=True)
@dataclass(frozen=True)
class Search(_Pattern):
    """1 where the pattern is found anywhere in the completion, thoughts included, else 0.

    Everything behind "regex:" is the pattern; write options into it: (?i) for any case, (?s) for a dot
    that matches line ends.
    """

    def __call__(self, text, row, tokens):
        return float(re.search(self.pattern, text) is not None)


@verifier("regex-full", main="pattern", verbatim=True)
@dataclass(frozen=True)
class FullMatch(_Pattern):
    """1 where the pattern matches the whole completion, white space around it aside, else 0."""

    def __call__(self, text, row, tokens):
        return float(re.fullmatch(self.pattern, text.strip()) is not None)


# -- structure -------------------------------------------------------------------------------------

_FENCE = re.compile(r"```(?:json)?(.*)```", re.S | re.I)


def read_json(text: str) -> tuple[bool, object]:
    """(whether the answer is valid JSON, its value). A code fence around it is taken off."""
    text = after_thinking(text).strip()
    fenced = _FENCE.fullmatch(text)
    try:
        return True, json.loads(fenced[1] if fenced else text, parse_constant=_refuse)
    # Too deep and too long for Python is neither a crash nor a good answer.
    except (ValueError, RecursionError):
        return False, None


def _refuse(constant):
    raise ValueError(f"{constant} is not JSON")


@verifier("json", main="kind")
@dataclass(frozen=True)
class Json(Verifier):
    """1 where the completion is valid JSON and nothing else, else 0.

    A ```json fence around it is allowed; thoughts before </think> do not count.
    """

    kind: str = setting(
        "object", "What it must be: the number 1 is JSON too.", choices=("object", "array", "any")
    )

    def __call__(self, text, row, tokens):
        valid, value = read_json(text)
        wanted = {"object": dict, "array": list, "any": object}[self.kind]
        return float(valid and isinstance(value, wanted))


@verifier("json-schema", main="schema", verbatim=True)
@dataclass(frozen=True)
class JsonSchema(Verifier):
    """1 where the completion is JSON that a JSON schema accepts, else 0 (read like `json`)."""

    schema: str | None = setting(None, "File with the schema.")

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "_accepts", _schema_check(self.schema))

    def __call__(self, text, row, tokens):
        valid, value = read_json(text)
        return float(valid and self._accepts(value))


def _schema_check(file: str | None) -> Callable[[object], bool]:
    """Whether a value fits the schema in a file, as a function. References to the net are refused."""
    if not file:
        raise SettingsError("a file is needed, for example json-schema:schema.json")
    try:
        import jsonschema
        from referencing import Registry
        from referencing.exceptions import Unresolvable
    except ImportError:
        raise SettingsError(
            "the package jsonschema is needed; install it with: pip install 'jsonschema>=4.18'"
        ) from None
    schema = _read_schema(file)
    kind = jsonschema.validators.validator_for(schema)
    try:
        kind.check_schema(schema)
    except jsonschema.SchemaError as error:
        raise SettingsError(f"{file}: is no JSON schema: {error.message}") from None
    validator = kind(schema, registry=Registry())

    def accepts(value):
        try:
            return validator.is_valid(value)
        except Unresolvable as error:
            raise SettingsError(
                f"{file}: its reference {error.ref!r} leads nowhere; put what it refers to into the file"
            ) from None
        except RecursionError:
            return False

    return accepts


def _read_schema(file):
    try:
        return json.loads(Path(file).expanduser().read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SettingsError(f"{file}: no such schema file") from None
    except (OSError, ValueError) as error:
        raise SettingsError(f"{file}: cannot be read as JSON: {error}") from None


def thinks_first(text: str, opened: bool = False) -> bool:
    """Whether a completion is <think>...</think> and then an answer, each mark exactly once."""
    text = f"<think>{text}" if opened else text.strip()
    thoughts, _, answer = text.partition("</think>")
    return (
        thoughts.startswith("<think>")
        and text.count("<think>") == text.count("</think>") == 1
        and bool(answer.strip())
    )


@verifier("format")
@dataclass(frozen=True)
class Format(Verifier):
    """1 where the completion is <think>...</think> and then an answer, else 0.

    As in Guo et al. 2025 (DeepSeek-R1, arXiv:2501.12948). Each mark must stand there once, and
    something behind </think>.
    """

    opened: bool = setting(False, "The prompt's template already ends with <think>.")
    answer_tags: bool = setting(False, "The answer must stand in <answer>...</answer>.")

    def __call__(self, text, row, tokens):
        if not thinks_first(text, self.opened):
            return 0.0
        answer = after_thinking(text).strip()
        tagged = re.fullmatch(r"<answer>.*\S.*</answer>", answer, re.S) is not None
        once = answer.count("<answer>") == answer.count("</answer>") == 1
        return float(not self.answer_tags or (tagged and once))


# -- length and repetition -------------------------------------------------------------------------


@verifier("length", main="max")
@dataclass(frozen=True)
class Length(Verifier):
    """1 for completions of `min` to `max` tokens, falling in a straight line to 0 outside.

    It reaches 0 at no tokens, and at `slack` tokens more than `max`.
    """

    min: int | None = setting(None, "Fewest tokens of full reward.", minimum=1)
    max: int | None = setting(None, "Most tokens of full reward.", minimum=1)
    slack: int | None = setting(
        None, "Tokens over max at which nothing is left; as many as max.", minimum=1
    )

    def __post_init__(self):
        super().__post_init__()
        if self.min is None and self.max is None:
            raise SettingsError("max or min is needed, for example length:max=200")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise SettingsError(f"min {self.min} is greater than max {self.max}")

    def __call__(self, text, row, tokens):
        if self.min is not None and tokens < self.min:
            return tokens / self.min
        if self.max is not None and tokens > self.max:
            return max(1 - (tokens - self.max) / (self.slack or self.max), 0.0)
        return 1.0


def overlong_penalty(tokens: int, max: int, cache: int) -> float:
    """DAPO's soft overlong punishment (Yu et al. 2025, arXiv:2503.14476, equation 13).

    0 up to max - cache tokens, then a straight line to -1 at max, and -1 beyond.
    """
    over = tokens - (max - cache)
    return -1.0 if over >= cache else -over / cache if over > 0 else 0.0


@verifier("overlong", main="max")
@dataclass(frozen=True)
class Overlong(Verifier):
    """0 up to max - cache tokens, falling in a straight line to -1 at max tokens (DAPO).

    Set max to the limit of sampling. (Yu et al. 2025, arXiv:2503.14476, equation 13.)
    """

    max: int | None = setting(None, "Tokens that cost the whole penalty.", minimum=1)
    cache: int | None = setting(
        None, "Tokens before max at which it begins; a fifth of max.", minimum=1
    )

    def __post_init__(self):
        super().__post_init__()
        if self.max is None:
            raise SettingsError("max is needed, for example overlong:max=512,cache=128")
        if self.cache is not None and self.cache > self.max:
            raise SettingsError(f"cache {self.cache} is greater than max {self.max}")

    def __call__(self, text, row, tokens):
        return overlong_penalty(tokens, self.max, self.cache or -(-self.max // 5))


def repetition_penalty(items: Sequence, n: int = 3, penalty: float = -1.0) -> float:
    """penalty * (1 - distinct / all n-grams) of a sequence; 0 where it is shorter than n.

    Yeo et al. 2025, arXiv:2502.03373, appendix C.2.
    """
    grams = [tuple(items[i : i + n]) for i in range(len(items) - n + 1)]
    return penalty * (1 - len(set(grams)) / len(grams)) if grams else 0.0


@verifier("repetition", main="n")
@dataclass(frozen=True)
class Repetition(Verifier):
    """`penalty` times the share of n-grams of words that have occurred before.

    Yeo et al. 2025, arXiv:2502.03373, appendix C.2. Deviation: they count tokens, this counts words
    (or characters), in lower case.
    """

    n: int = setting(3, "Words in an n-gram.", minimum=1)
    penalty: float = setting(-1.0, "The reward of nothing but repetition.", maximum=0)
    unit: str = setting(
        "words",
        "What is counted; characters suit languages without spaces.",
        choices=("words", "characters"),
    )

    def __call__(self, text, row, tokens):
        words = text.lower().split()
        items = words if self.unit == "words" else "".join(words)
        return repetition_penalty(items, self.n, self.penalty)


# -- by name ---------------------------------------------------------------------------------------

_YES_NO = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def make_verifier(name: str, options: str = "") -> Verifier:
    """The verifier of a registered name with its options as text: "max=200,min=20", or a value alone.

    Raises `SettingsError` that names the verifier and the nearest known option.
    """
    cls = VERIFIERS[name]
    try:
        return cls(**_read_options(cls, options))
    except SettingsError as error:
        raise SettingsError(f"{name}: {error}") from None


def _read_options(cls, text: str) -> dict:
    if not text:
        return {}
    if cls.verbatim:
        return {cls.main: text}
    kinds = {field.name: value_type(field)[0] for field in fields(cls)}
    values = {}
    for part in text.split(","):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals:
            key, value = cls.main, key
        if key is None or not value:
            raise SettingsError(f"{part.strip()!r} is not of the form option=value")
        key = key.replace("-", "_")
        if key not in kinds:
            known = ", ".join(kinds)
            raise SettingsError(f"no option {key!r}{nearest(key, kinds)}; its options: {known}")
        if key in values:
            raise SettingsError(f"{key!r} is given twice")
        values[key] = _YES_NO.get(value.lower(), value) if kinds[key] is bool else value
    return values


def verifier_help() -> str:
    """What the built-in verifiers are called, reward, and take as options, as indented text."""
    return "\n".join(_help_of(cls) for cls in VERIFIERS.values())


def _help_of(cls) -> str:
    summary = inspect.getdoc(cls).split("\n\n")[0].replace("\n", " ")
    lines = [f"{cls.name}", f"    {summary}"]
    for field in fields(cls):
        default = "" if field.default is None else f"  [default: {_spelt(field.default)}]"
        lines.append(f"    {field.name}=  {field.metadata['help']}{default}")
    return "\n".join(lines)


def _spelt(value) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
