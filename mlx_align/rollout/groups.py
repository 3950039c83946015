"""Several samples of each prompt, the prompt computed once for all of them.

The prompt's keys and values are computed once and handed to all its samples; what is sampled is kept as
ids, never as text that would have to be tokenised again. Sampling runs through mlx-lm's batch
generator, on the model as it stands, adapter and all.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_align.model.load import LoadedModel
from mlx_align.rollout.sampler import room

# Sequences that are decoded together.
DECODED_TOGETHER = {mx.cpu: 32, mx.gpu: 128}


@dataclass(frozen=True, eq=False)
class Sample:
    """One completion: its ids with the end token or text (int32[C]), their log-probabilities when they
    were sampled (float32[C]), and whether it ended by itself."""

    ids: np.ndarray
    logp: np.ndarray
    finished: bool


def sample_groups(
    loaded: LoadedModel,
    prompts: Sequence[Sequence[int]],
    count: int,
    *,
    max_tokens: int,
    temperature: float,
    top_p: float = 1.0,
    top_k: int = 0,
    stop: Sequence[str] = (),
    seed: int = 0,
) -> list[list[Sample]]:
    """`count` samples of each prompt (ids), in the order of the prompts.

    A sample ends at any of the model's end tokens, or as soon as its text has one of `stop`.
    Log-probabilities are of the logits divided by the temperature, without the cuts of `top_p` and
    `top_k`. Raises `SettingsError` where a prompt fills the model's context.
    """
    from mlx_lm.generate import BatchGenerator
    from mlx_lm.sample_utils import make_sampler

    loaded.model.eval()
    mx.random.seed(seed)
    generator = BatchGenerator(
        loaded.model,
        stop_tokens=[[t] for t in sorted(loaded.tokenizer.eos_token_ids)],
        sampler=make_sampler(temperature, 0.0 if top_p == 1 else top_p, top_k=top_k),
        completion_batch_size=DECODED_TOGETHER[mx.default_device().type],
    )
    try:
        with mx.stream(generator.stream):
            caches = [_prefill(loaded, prompt) for prompt in prompts]
        uids = generator.insert(
            [list(p[-1:]) for p in prompts for _ in range(count)],
            caches=[copy.deepcopy(c) for c in caches for _ in range(count)],
            all_tokens=[list(p[:-1]) for p in prompts for _ in range(count)],
            max_tokens=[room(loaded, p, max_tokens) for p in prompts for _ in range(count)],
        )
        ends = TextEnds(loaded.tokenizer, stop)
        samples = _decode(generator, uids, temperature, ends)
    finally:
        generator.close()
    return [samples[i * count : (i + 1) * count] for i in range(len(prompts))]


def _prefill(loaded, prompt):
    """The cache of a prompt but its last token."""
    from mlx_lm.models.cache import make_prompt_cache

    cache = make_prompt_cache(loaded.model)
    if len(prompt) > 1:
        # Only what the cache takes is computed; nothing asks for the logits.
        loaded.model(mx.array(prompt[:-1])[None], cache=cache)
        mx.eval([c.state for c in cache])
    return cache


class TextEnds:
    """Tells when sampled ids have come to a text that ends a completion."""

    def __init__(self, tokenizer, texts: Sequence[str]):
        self._tokenizer, self._texts = tokenizer, texts
        # A token that ends within the text is at least one byte of it.
        self._span = max((len(text.encode()) for text in texts), default=0) + 1

    def __call__(self, ids: Sequence[int]) -> bool:
        if not self._texts:
            return False
        tail = self._tokenizer.decode(ids[-self._span :])
        return any(text in tail for text in self._texts)


def _log_prob(response, temperature) -> mx.array:
    """The log-probability of the token that was sampled, at the temperature."""
    if temperature == 1 and response.logprobs.dtype == mx.float32:
        # Normalised as they come.
        return response.logprobs[response.token]
    scaled = response.logprobs.astype(mx.float32) / temperature
    return scaled[response.token] - mx.logsumexp(scaled)


def _decode(generator, uids, temperature, ends: TextEnds) -> list[Sample]:
    ids = {uid: [] for uid in uids}
    logps = {uid: [] for uid in uids}
    finished: dict[int, bool] = {}
    while len(finished) < len(uids):
        responses = generator.next_generated()
        chosen, ended = [], []
        for response in responses:
            uid = response.uid
            ids[uid].append(response.token)
            chosen.append(_log_prob(response, temperature))
            if ends(ids[uid]):
                finished[uid] = True
                ended += [uid] if response.finish_reason is None else []
            elif response.finish_reason is not None:
                finished[uid] = response.finish_reason == "stop"
        generator.remove(ended)
        for response, value in zip(responses, np.array(mx.stack(chosen)), strict=True):
            logps[response.uid].append(value)
    return [
        Sample(np.array(ids[u], np.int32), np.array(logps[u], np.float32), finished[u])
        for u in uids
    ]
