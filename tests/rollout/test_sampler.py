"""Generation: greedy is the chain of best tokens, ends where a turn ends, a chat reuses its cache."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_align import api
from mlx_align.errors import DataError, SettingsError
from mlx_align.rollout.sampler import Conversation, SamplingSettings, prompt_encoder, sample, stream


def greedy(loaded, prompt, count):
    """The chain of most likely tokens, one full forward pass each."""
    ids = list(prompt)
    for _ in range(count):
        token = int(mx.argmax(loaded.model(mx.array([ids]))[0, -1]))
        if token in loaded.tokenizer.eos_token_ids:
            break
        ids.append(token)
    return ids[len(prompt) :]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_greedy_is_the_chain_of_best_tokens(loaded_model, family):
    loaded = loaded_model(family)
    prompts = [[5, 6, 7], [9, 3, 2, 8, 30], [11]]
    found = sample(loaded, prompts, SamplingSettings(max_tokens=10))
    for prompt, completion in zip(prompts, found, strict=True):
        expected = greedy(loaded, prompt, 10)
        assert list(completion.ids) == expected
        assert completion.finished == (len(expected) < 10)
        streamed = [token for _, token in stream(loaded, prompt, SamplingSettings(max_tokens=10))]
        assert [t for t in streamed if t not in loaded.tokenizer.eos_token_ids] == expected


def test_sampling_follows_its_seed(loaded_model):
    loaded = loaded_model()

    def draw(seed):
        settings = SamplingSettings(max_tokens=12, temperature=1.0, seed=seed)
        return [c.ids for c in sample(loaded, [[5, 6, 7]] * 3, settings)]

    assert draw(1) == draw(1) != draw(2)
    assert len(set(draw(1))) > 1  # samples of one prompt differ


def test_generation_stays_inside_the_context(loaded_model):
    loaded = loaded_model("llama", max_position_embeddings=20)
    (completion,) = sample(loaded, [list(range(5, 20))], SamplingSettings(max_tokens=50))
    assert len(completion.ids) <= 5
    with pytest.raises(SettingsError, match="fills the model's context of 20"):
        sample(loaded, [[5] * 20], SamplingSettings())


def test_a_conversation_says_what_a_fresh_prompt_says(loaded_model):
    loaded = loaded_model("qwen3")
    settings = SamplingSettings(max_tokens=8)
    conversation = Conversation(loaded, settings, system="Be brief.")
    first = "".join(conversation.say("Hello"))
    second = "".join(conversation.say("And then?"))
    messages = [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": first}, {"role": "user", "content": "And then?"},
    ]  # fmt: skip
    encoder = prompt_encoder(loaded)
    for upto, answer in ((2, first), (4, second)):
        ids = encoder.prompt_ids(tuple(messages[:upto]))
        assert "".join(text for text, _ in stream(loaded, ids, settings)) == answer
    conversation.reset()
    assert "".join(conversation.say("Hello")) == first


def test_the_api_takes_text_and_messages(model_folder):
    model = str(model_folder())
    by_text, by_messages = (
        api.generate(model, [prompt], max_tokens=6)[0]
        for prompt in ("Hi", ({"role": "user", "content": "Hi"},))
    )
    assert by_text == by_messages
    raw = api.generate(model, ["Hi"], max_tokens=6, prompt_format="text")[0]
    assert raw.ids != by_text.ids


def test_prompt_files(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    assert api.prompts_from_file(tmp_path / "a.txt") == ["one", "two"]
    rows = '{"prompt": "one"}\n{"messages": [{"role": "user", "content": "two"}]}\n'
    (tmp_path / "b.jsonl").write_text(rows)
    assert api.prompts_from_file(tmp_path / "b.jsonl") == [
        "one",
        ({"role": "user", "content": "two"},),
    ]
    (tmp_path / "c.jsonl").write_text('{"x": 1}\n')
    with pytest.raises(DataError, match=r"c\.jsonl:1"):
        api.prompts_from_file(tmp_path / "c.jsonl")
    with pytest.raises(DataError, match="cannot be read"):
        api.prompts_from_file(tmp_path / "none.txt")


def test_generation_uses_the_adapter_as_it_is_now(loaded_model):
    from mlx_align.model.adapter import AdapterSettings, wear_adapter

    loaded = loaded_model()
    adapter = wear_adapter(loaded.model, AdapterSettings(), seed=0)
    settings = SamplingSettings(max_tokens=8)
    (before,) = sample(loaded, [[5, 6, 7]], settings)
    adapter.load({n: x + 0.2 for n, x in adapter.weights().items()}, "")
    (after,) = sample(loaded, [[5, 6, 7]], settings)
    assert before.ids != after.ids and list(after.ids) == greedy(loaded, [5, 6, 7], 8)
    with adapter.off():
        assert sample(loaded, [[5, 6, 7]], settings)[0].ids == before.ids
    assert np.isfinite(np.array(loaded.model(mx.array([[1]])))).all()
