"""Rewards: what a completion is worth, by verifiers, by a user's own functions, by reward models.

A reward is anything with a `name`, a `weight` and a call that takes a batch of requests. This module
names, loads, checks and adds them up; what the built-in ones compute is the business of
`mlx_align.rollout.verifiers`, and what becomes of the sums that of `mlx_align.rollout.advantages`.

    prompt, completion, data row -> Request -> Reward, Reward, ... -> Scored (weighted sum, and each)
"""

import asyncio
import contextlib
import dataclasses
import importlib.util
import inspect
import math
import re
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from mlx_align.data.records import Text
from mlx_align.errors import AlignError, SettingsError
from mlx_align.rollout.verifiers import VERIFIERS, Verifier, make_verifier
from mlx_align.settings import fingerprint, nearest


class RewardError(AlignError):
    """A reward could not be loaded, failed, or returned what is no reward."""


@dataclass(frozen=True)
class Request:
    """A completion to be judged.

    `prompt` is text or messages, `completion` its text without special tokens, `row` the fields of the
    data row that the prompt came from, `finished` whether the model ended by itself, `tokens` the
    completion's length, `origin` the "file:line" of the row, for errors.
    """

    prompt: Text
    completion: str
    row: Mapping
    finished: bool
    tokens: int
    origin: str = ""


@runtime_checkable
class Reward(Protocol):
    """A batch of completions in, a number for each out; None where it does not apply."""

    name: str
    weight: float

    def __call__(self, requests: Sequence[Request]) -> list[float | None]:
        """The unweighted reward of each request."""
        ...


@dataclass(frozen=True)
class VerifierReward:
    """A built-in verifier."""

    name: str
    verifier: Verifier
    weight: float = 1.0

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of a data row that it reads."""
        return self.verifier.columns

    def __call__(self, requests: Sequence[Request]) -> list[float | None]:
        """The verifier's number for each request."""
        return [self.verifier(r.completion, r.row, r.tokens) for r in requests]


@dataclass(frozen=True)
class ModelReward:
    """A reward model: its normalised reward, (score - mean) / deviation on its training data."""

    name: str
    model: object
    weight: float = 1.0

    def __call__(self, requests: Sequence[Request]) -> list[float | None]:
        """The model's reward for each request."""
        if not requests:
            return []
        # An empty completion has no token to score.
        scores = self.model.score([(r.prompt, r.completion or " ") for r in requests])
        return check_rewards(self.name, scores, requests)


# -- a user's function -----------------------------------------------------------------------------

# What a request itself gives; a column of the data row with such a name is not passed on.
_OWN = frozenset(("prompt", "prompts", "completion", "completions", "finished", "tokens"))


@dataclass(frozen=True)
class FunctionReward:
    """A user's function, in one of two forms that its parameter names tell apart.

        f(prompts, completions, **columns) -> list     for a batch, as in TRL: every column a list
        f(prompt, completion, **columns) -> number     for one completion

    Prompts are text or lists of messages, completions text. Columns of the data row, and `finished`
    and `tokens`, are passed where the function names them or takes **kwargs; None where a row lacks
    one. It returns numbers, booleans, or None where it does not apply; it may be `async`.

    Every call has `timeout` seconds in a thread of its own. Code that works with lazy MLX arrays of
    the main thread needs timeout 0: no limit, no thread. A function that runs late cannot be stopped,
    only left behind.
    """

    name: str
    function: Callable
    weight: float = 1.0
    timeout: float = 60.0

    def __post_init__(self):
        object.__setattr__(self, "_form", _read_signature(self.name, self.function))

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of a data row that it cannot do without."""
        return tuple(sorted(self._form.required - _OWN))

    def __call__(self, requests: Sequence[Request]) -> list[float | None]:
        """The function's number for each request.

        Raises `RewardError` that names the function and the request where it fails, is late, or
        returns something else.
        """
        if not requests:
            return []
        columns = sorted({column for r in requests for column in r.row} - _OWN)
        if self._form.batched:
            values = self._call(self._batch_arguments(requests, columns), requests)
        else:
            values = [self._call(self._arguments(r, columns), [r]) for r in requests]
        return check_rewards(self.name, values, requests)

    def _batch_arguments(self, requests, columns):
        return self._form.accepted(
            prompts=[_for_users(r.prompt) for r in requests],
            completions=[r.completion for r in requests],
            finished=[r.finished for r in requests],
            tokens=[r.tokens for r in requests],
            columns={c: [r.row.get(c) for r in requests] for c in columns},
            absent=[None] * len(requests),
        )

    def _arguments(self, request, columns):
        return self._form.accepted(
            prompt=_for_users(request.prompt),
            completion=request.completion,
            finished=request.finished,
            tokens=request.tokens,
            columns={c: request.row.get(c) for c in columns},
            absent=None,
        )

    def _call(self, arguments, requests):
        at = _describe(requests[0], 0, len(requests))
        if len(requests) > 1:
            at = f"in a batch of {len(requests)} that begins with {at}"
        try:
            return call_within(self.timeout, lambda: _result(self.function(**arguments)))
        except _Late:
            raise RewardError(
                f"reward {self.name}: no result after {self.timeout:g} seconds, {at}. Make it faster, "
                "give what it waits for a time limit of its own, or raise the limit of rewards."
            ) from None
        # The code is the user's own: whatever it raises is reported as its fault, with the place.
        except (Exception, SystemExit) as error:
            what = _what(error, _file_of(self.function))
            raise RewardError(f"reward {self.name}: {what}, {at}{_advice(error)}") from error


@dataclass(frozen=True)
class _Form:
    """Which arguments a function takes by name."""

    batched: bool
    named: frozenset[str]
    required: frozenset[str]
    takes_any: bool

    def accepted(self, columns, absent, **own):
        """The arguments it takes; `absent` stands for a column that it needs and no row has."""
        arguments = dict.fromkeys(self.required, absent) | columns | own
        if self.takes_any:
            return arguments
        return {name: value for name, value in arguments.items() if name in self.named}


def _read_signature(name: str, function: Callable) -> _Form:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        raise RewardError(
            f"reward {name}: its parameters cannot be read; wrap it in a function of your own"
        ) from None
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    named = frozenset(p.name for p in parameters if p.kind in by_name)
    batched, single = "completions" in named, "completion" in named
    if batched == single:
        found = ", ".join(str(p) for p in parameters) or "nothing"
        raise RewardError(
            f"reward {name}: takes ({found}). A reward function takes completions (all of a batch, "
            "and prompts where it needs them) or completion (one, and prompt), by these names."
        )
    required = {p.name for p in parameters if p.kind in by_name and p.default is p.empty}
    wrong = required & ({"prompt", "completion"} if batched else {"prompts", "completions"})
    if wrong:
        raise RewardError(
            f"reward {name}: mixes the two forms; take prompts and completions (lists), or prompt and "
            "completion"
        )
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    return _Form(batched, named, frozenset(required), takes_any)


class _Late(Exception):
    """No result within the time limit."""


def call_within(seconds: float, work: Callable[[], object]):
    """What `work` returns, or raises; `_Late` where it takes longer.

    0 seconds: no limit, in the calling thread. Otherwise in a daemon thread, which a process that
    ends does not wait for.
    """
    if not seconds:
        return work()
    results, errors = [], []

    def attempt():
        try:
            results.append(work())
        # Raised again in the calling thread.
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=attempt, name="mlx-align reward", daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise _Late
    return results[0]


def _result(value):
    """What a function gave, awaited, as plain numbers.

    Belongs into the function's own thread: lazy MLX arrays cannot be read in another.
    """
    return _plain(asyncio.run(value) if inspect.iscoroutine(value) else value)


def _plain(value):
    """Arrays and scalars of NumPy, MLX and torch as Python's lists and numbers."""
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value.tolist() if hasattr(value, "tolist") else value


def _for_users(prompt: Text):
    """A prompt that a function may change without changing the data."""
    return prompt if isinstance(prompt, str) else [dict(message) for message in prompt]


def _file_of(function) -> str:
    """The file that a function, or an object that is called, was written in."""
    code = getattr(function, "__code__", None) or getattr(type(function).__call__, "__code__", None)
    return code.co_filename if code else ""


def _what(error, file: str) -> str:
    """What went wrong in a user's code, with the last line of their file that was reached."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == file]
    place = f" ({Path(file).name}, line {frames[-1].lineno})" if frames else ""
    return f"raised {type(error).__name__}: {error}{place}"


def _advice(error) -> str:
    if "in current thread" in str(error):
        return ". Lazy MLX arrays belong to their thread: give rewards a time limit of 0 (none)."
    return ". Mend it, or return None where it does not apply."


# -- what rewards return ---------------------------------------------------------------------------


def check_rewards(name: str, values, requests: Sequence[Request]) -> list[float | None]:
    """What a reward returned as floats and None, one for each request.

    Raises `RewardError` where there are more or fewer, or one is no finite number.
    """
    values = _plain(values)
    if not isinstance(values, list):
        raise RewardError(
            f"reward {name}: returned {_short(repr(values))} for {len(requests)} completions; it must "
            "return a list with one number (or None) for each"
        )
    count = len(requests)
    if len(values) != count:
        at = f", {_describe(requests[0], 0, count)} and so on" if requests else ""
        raise RewardError(
            f"reward {name}: returned {len(values)} numbers for {count} completions{at}; it must "
            "return one for each, and None where it does not apply"
        )
    return [
        None if value is None else _as_number(name, value, _describe(request, i, count))
        for i, (value, request) in enumerate(zip(values, requests, strict=True))
    ]


def _as_number(name, value, at) -> float:
    number = math.nan
    if isinstance(value, Real):
        # Whole numbers may be too large to be a float.
        with contextlib.suppress(OverflowError):
            number = float(value)
    if math.isfinite(number):
        return number
    raise RewardError(
        f"reward {name}: returned {_short(repr(value))}, {at}; it must be a finite number, true or "
        "false, or None where it does not apply"
    )


def _describe(request, index, count) -> str:
    """Where a request came from and how its prompt reads, for errors."""
    prompt = request.prompt
    if not isinstance(prompt, str):
        prompt = str(prompt[-1].get("content") or "") if prompt else ""
    place = request.origin or f"completion {index + 1} of {count}"
    return f"at {place}, prompt {_short(prompt)!r}"


def _short(text: str, limit: int = 60) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


# -- all of them -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scored:
    """`total` float64[n], the weighted sums; `rewards` float64[n] for every name, unweighted.

    NaN where a reward does not apply, and in `total` where none does.
    """

    total: np.ndarray
    rewards: dict[str, np.ndarray]


def combine(rewards: Sequence[Reward], requests: Sequence[Request]) -> Scored:
    """The weighted sum of all rewards that apply to each request.

    A reward of weight 0 is only reported: where no other applies, the total is NaN all the same.
    """
    parts = {}
    for reward in rewards:
        if reward.name in parts:
            raise SettingsError(f"two rewards are called {reward.name!r}; give each its own name")
        values = check_rewards(reward.name, reward(requests), requests)
        parts[reward.name] = np.array([np.nan if v is None else v for v in values], np.float64)
    counted = [(r.weight, parts[r.name]) for r in rewards if r.weight]
    total = np.zeros(len(requests))
    applies = np.zeros(len(requests), bool)
    for weight, values in counted:
        applies |= np.isfinite(values)
        total += weight * np.nan_to_num(values)
    return Scored(np.where(applies, total, np.nan), parts)


def check_columns(rewards: Iterable[Reward], rows: Iterable[Mapping]) -> None:
    """Refuse rewards that read a column which no row has: they would never apply."""
    known = {column for row in rows for column, value in row.items() if value is not None}
    missing = [
        f"reward {reward.name} reads the column {column!r}, which no row has{nearest(column, known)}"
        for reward in rewards
        for column in getattr(reward, "columns", ())
        if column not in known
    ]
    if missing:
        raise SettingsError(f"{'; '.join(missing)}. The columns: {', '.join(sorted(known))}")


# -- rewards by name -------------------------------------------------------------------------------

# The last "*", where a number is all that follows it.
_WEIGHTED = re.compile(
    r"(?P<reward>.+)\*\s*(?P<weight>[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*", re.S
)
_FILE = re.compile(r"(?P<file>.+\.py)(?::(?P<function>[^:]*))?", re.S)


def parse_rewards(
    specs: Sequence[str | Callable | Reward],
    *,
    timeout: float = 60.0,
    open_model: Callable[[str], object] | None = None,
) -> list[Reward]:
    """The rewards that a user names, opened and checked.

        gsm8k   length:max=200   regex:PATTERN     a built-in verifier, with options
        my_rewards.py:correct                      a function in a Python file
        runs/reward-0712                           the run folder of a reward model
        judge:mlx-community/Qwen3-4B-4bit          a local model that compares completions
        gsm8k*2   my_rewards.py:correct*0.5        each with a weight (1 if not given; 0 only reports)

    The weight is what follows the last "*", if that is a number; a pattern that ends like one gets a
    weight behind it: `regex:a*2*1`. From Python, functions and `Reward` objects may stand for
    themselves. `timeout` is the time limit in seconds of one call of a function, 0 for none;
    `open_model(folder)` opens reward models (default: `open_reward_model`). A folder that is called
    like a verifier is written ./gsm8k.

    A Python file is run once, with its folder importable meanwhile. Raises `SettingsError` for what
    cannot be understood and `RewardError` for code that cannot be loaded.
    """
    specs = [specs] if isinstance(specs, str) else specs
    modules: dict[Path, object] = {}
    rewards = [_parse(spec, timeout, open_model or _open_model, modules) for spec in specs]
    if not any(reward.weight for reward in rewards):
        raise SettingsError("no reward has a weight, so there is nothing to learn from; name one")
    return _with_own_names(rewards)


def _parse(spec, timeout, open_model, modules) -> Reward:
    if isinstance(spec, Reward):
        return spec
    if callable(spec):
        return FunctionReward(getattr(spec, "__name__", type(spec).__name__), spec, 1.0, timeout)
    text, weight = _split_weight(spec)
    if not math.isfinite(weight):
        raise SettingsError(f"reward {spec!r}: its weight is too large")
    name, _, options = text.partition(":")
    name = name.strip().replace("_", "-")
    if name in VERIFIERS:
        return VerifierReward(text, make_verifier(name, options.strip()), weight)
    if name == "judge":
        from mlx_align.rollout.judge import Judge, JudgeReward

        return JudgeReward(text, Judge(options.strip()), weight)
    file = _FILE.fullmatch(text)
    if file:
        function = _load_function(Path(file["file"]).expanduser(), file["function"] or "", modules)
        return FunctionReward(
            f"{Path(file['file']).name}:{file['function']}", function, weight, timeout
        )
    folder = Path(text).expanduser()
    if folder.is_dir():
        return ModelReward(folder.resolve().name, open_model(str(folder)), weight)
    raise SettingsError(_unknown(text))


def _split_weight(spec: str) -> tuple[str, float]:
    text = spec.strip()
    weighted = _WEIGHTED.fullmatch(text)
    if weighted is None:
        return text, 1.0
    return weighted["reward"].strip(), float(weighted["weight"])


def with_absolute_path(spec: str) -> str:
    """A named reward whose file or folder is found from anywhere on this machine."""
    text, _ = _split_weight(spec)
    start = "judge:" if text.startswith("judge:") else ""
    file = _FILE.fullmatch(text)
    named = file["file"] if file else text[len(start) :]
    path = Path(named).expanduser()
    if text.partition(":")[0] in VERIFIERS or not path.exists():
        return spec
    return f"{start}{path.resolve()}{spec.strip()[len(start + named) :]}"


def _open_model(folder):
    from mlx_align.model.reward import open_reward_model

    return open_reward_model(folder)


def _unknown(text: str) -> str:
    """What is wrong with a reward that is none of the three kinds."""
    head, star, tail = text.rpartition("*")
    if star and (head.partition(":")[0] in VERIFIERS or _FILE.fullmatch(head)):
        return f"reward {text!r}: the weight behind * must be a number, not {tail!r}"
    name = text.partition(":")[0]
    return (
        f"reward {text!r}: is no verifier, file or folder{nearest(name, VERIFIERS)}. Verifiers are "
        f"{', '.join(VERIFIERS)}; a function of your own is written my_rewards.py:function; a reward "
        "model is the run folder of mlx-align reward; judge:MODEL compares completions."
    )


def _with_own_names(rewards):
    """The rewards under names that differ: a second `length` becomes `length-2`."""
    taken: dict[str, int] = {}
    named = []
    for reward in rewards:
        count = taken[reward.name] = taken.get(reward.name, 0) + 1
        if count > 1 and dataclasses.is_dataclass(reward):
            reward = dataclasses.replace(reward, name=f"{reward.name}-{count}")
        named.append(reward)
    return named


def _load_function(file: Path, name: str, modules: dict) -> Callable:
    """A function of a Python file, which is run unless `modules` holds it."""
    path = file.resolve()
    if not path.is_file():
        raise SettingsError(f"reward {file}:{name}: there is no file {file}")
    if path not in modules:
        modules[path] = _run_file(file, path)
    found = vars(modules[path])
    function = found.get(name)
    if callable(function):
        return function
    own = [
        n for n, f in found.items() if inspect.isfunction(f) and f.__module__ == found["__name__"]
    ]
    names = ", ".join(n for n in own if not n.startswith("_")) or "none"
    if not name:
        raise SettingsError(f"reward {file}: which function? Write {file}:NAME; it has: {names}")
    raise SettingsError(
        f"reward {file}:{name}: {file} has no function {name!r}{nearest(name, own)}; it has: {names}"
    )


def _run_file(file: Path, path: Path):
    """A Python file as a module that its own classes and pickles can find."""
    name = f"mlx_align_rewards_{path.stem}_{fingerprint(str(path))[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    # The code is the user's own: whatever it raises is reported as its fault, with the place.
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise RewardError(f"reward {file}: cannot be loaded: {_what(error, str(path))}") from error
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(str(path.parent))
    return module
