"""Text from a model: one prompt as a stream, many prompts as a batch, a conversation with a cache."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx

from mlx_align.data.records import Message, Text
from mlx_align.data.template import Encoder
from mlx_align.errors import SettingsError
from mlx_align.model.load import LoadedModel
from mlx_align.settings import Settings, setting


@dataclass(frozen=True)
class SamplingSettings(Settings):
    """How completions are sampled."""

    max_tokens: int = setting(256, "Longest completion in tokens.", minimum=1)
    temperature: float = setting(
        0.0, "Randomness; 0 takes the most likely token.", minimum=0, aliases=("temp",)
    )
    top_p: float = setting(
        1.0, "Sample from the most likely tokens of this total.", above=0, maximum=1
    )
    seed: int = setting(0, "Seed of the sampling.", minimum=0)

    def sampler(self):
        """mlx-lm's sampler for these settings."""
        from mlx_lm.sample_utils import make_sampler

        return make_sampler(self.temperature, 0.0 if self.top_p == 1 else self.top_p)


@dataclass(frozen=True)
class Completion:
    """What a model said: its ids without the end token, their text, and whether it ended by itself."""

    ids: tuple[int, ...]
    text: str
    finished: bool


def prompt_encoder(loaded: LoadedModel, prompt_format: str = "auto") -> Encoder:
    """An encoder that renders prompts as training does."""
    return Encoder(
        loaded.tokenizer,
        max_length=loaded.context_length or 1 << 20,
        template=loaded.template,
        prompt_format=prompt_format,
    )


def sample(
    loaded: LoadedModel, prompts: Sequence[Sequence[int]], settings: SamplingSettings
) -> list[Completion]:
    """One completion for each prompt (ids), computed together."""
    from mlx_lm.generate import batch_generate

    if not prompts:
        return []
    loaded.model.eval()
    mx.random.seed(settings.seed)
    limits = [room(loaded, prompt, settings.max_tokens) for prompt in prompts]
    response = batch_generate(
        loaded.model,
        loaded.tokenizer,
        [list(p) for p in prompts],
        max_tokens=limits,
        sampler=settings.sampler(),
        return_token_ids=True,
    )
    return [
        Completion(
            tuple(ids), loaded.tokenizer.decode(ids, skip_special_tokens=True), len(ids) < limit
        )
        for ids, limit in zip(response.token_ids, limits, strict=True)
    ]


def stream(
    loaded: LoadedModel, prompt: Sequence[int], settings: SamplingSettings, cache=None
) -> Iterator[tuple[str, int]]:
    """(text, id) as they come; `cache` holds what came before the prompt."""
    from mlx_lm.generate import stream_generate

    loaded.model.eval()
    options = {} if cache is None else {"prompt_cache": cache}
    for piece in stream_generate(
        loaded.model,
        loaded.tokenizer,
        list(prompt),
        max_tokens=settings.max_tokens,
        sampler=settings.sampler(),
        **options,
    ):
        yield piece.text, piece.token


class Conversation:
    """A chat that computes only what is new in every turn."""

    def __init__(self, loaded: LoadedModel, settings: SamplingSettings, system: str | None = None):
        self._loaded = loaded
        self._settings = settings
        self._encoder = prompt_encoder(loaded)
        self._system = system
        mx.random.seed(settings.seed)
        self.reset()

    def reset(self) -> None:
        """Forget everything said."""
        self.messages: list[Message] = []
        if self._system:
            self.messages.append({"role": "system", "content": self._system})
        self._seen: list[int] = []
        self._cache = None

    def say(self, text: str) -> Iterator[str]:
        """The answer to a user's turn, piece by piece."""
        from mlx_lm.models.cache import make_prompt_cache

        self.messages.append({"role": "user", "content": text})
        prompt = self._encoder.prompt_ids(self._as_prompt())
        known = len(self._seen)
        if self._cache is None or prompt[:known] != self._seen or len(prompt) == known:
            self._cache, known = make_prompt_cache(self._loaded.model), 0
        answer, ids = "", []
        for piece, token in stream(self._loaded, prompt[known:], self._settings, self._cache):
            answer += piece
            ids.append(token)
            yield piece
        # How many of the sampled tokens the model has taken in already, only its cache can tell.
        fed = getattr(self._cache[0], "offset", None)
        self._seen = [*prompt, *ids][:fed]
        if fed != len(self._seen):
            self._cache = None
        self.messages.append({"role": "assistant", "content": answer})

    def _as_prompt(self) -> Text:
        if self._loaded.template is not None:
            return tuple(self.messages)
        # Without a template a conversation is text that goes on.
        return "\n".join(m["content"] for m in self.messages)


def room(loaded, prompt, wanted: int) -> int:
    """How many of the wanted tokens fit behind a prompt (ids)."""
    if not loaded.context_length:
        return wanted
    room = loaded.context_length - len(prompt)
    if room <= 0:
        raise SettingsError(
            f"a prompt of {len(prompt)} tokens fills the model's context of {loaded.context_length}"
        )
    return min(wanted, room)
