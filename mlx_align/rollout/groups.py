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

# Sequences that are decoded together.
DECODED_TOGETHER = {mx.cpu: 32, mx.gpu: 128}


@dataclass(frozen=True, eq=False)
class Sample:
    """One completion: its ids with the end token (int32[C]), their log-probabilities when they were
    sampled (float32[C]), and whether it ended by itself."""

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
    seed: int = 0,
) -> list[list[Sample]]:
    """`count` samples of each prompt (ids), in the order of the prompts.

    Log-probabilities are of the logits divided by the temperature, without the cut of `top_p`.
    """
    from mlx_lm.generate import BatchGenerator
    from mlx_lm.sample_utils import make_sampler

    loaded.model.eval()
    mx.random.seed(seed)
    generator = BatchGenerator(
        loaded.model,
        max_tokens=max_tokens,
        stop_tokens=[[t] for t in sorted(loaded.tokenizer.eos_token_ids)],
        sampler=make_sampler(temperature, 0.0 if top_p == 1 else top_p),
        completion_batch_size=DECODED_TOGETHER[mx.default_device().type],
    )
    try:
        with mx.stream(generator.stream):
            caches = [_prefill(loaded, prompt) for prompt in prompts]
        uids = generator.insert(
            [list(p[-1:]) for p in prompts for _ in range(count)],
            caches=[copy.deepcopy(c) for c in caches for _ in range(count)],
            all_tokens=[list(p[:-1]) for p in prompts for _ in range(count)],
        )
        samples = _decode(generator, uids, temperature)
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


def _decode(generator, uids, temperature) -> list[Sample]:
    ids = {uid: [] for uid in uids}
    logps = {uid: [] for uid in uids}
    finished: dict[int, bool] = {}
    while len(finished) < len(uids):
        responses = generator.next_generated()
        chosen = []
        for response in responses:
            ids[response.uid].append(response.token)
            scaled = response.logprobs.astype(mx.float32) / temperature
            chosen.append(scaled[response.token] - mx.logsumexp(scaled))
            if response.finish_reason is not None:
                finished[response.uid] = response.finish_reason == "stop"
        for response, value in zip(responses, np.array(mx.stack(chosen)), strict=True):
            logps[response.uid].append(value)
    return [
        Sample(np.array(ids[u], np.int32), np.array(logps[u], np.float32), finished[u])
        for u in uids
    ]
