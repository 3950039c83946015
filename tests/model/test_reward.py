"""Reward models: the score of the last token, kept with its head, the same in transformers."""

import json

import mlx.core as mx
import numpy as np
import pytest
from train.test_loop import write_pairs

from mlx_align import api
from mlx_align.data.template import make_example
from mlx_align.errors import ExportError, ModelError, SettingsError
from mlx_align.model.forward import choose_layout, make_batches, rewards
from mlx_align.model.heads import attach_reward_head
from mlx_align.model.load import load_model
from mlx_align.model.reward import open_reward_model

PROMPT = "What do you think about that?"


@pytest.fixture
def reward_run(model_folder, tmp_path):
    data = write_pairs(tmp_path / "pairs.jsonl", 16)

    def make(family="qwen2", **settings):
        return api.train_model(
            "reward",
            model=str(
                model_folder(family, **({"sliding_window": None} if family == "mistral" else {}))
            ),
            data=str(data),
            output=str(tmp_path / f"run-{family}"),
            steps=4,
            learning_rate=1e-2,
            valid_share=0.2,
            **settings,
        ).folder

    return make


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "mamba"])
def test_the_score_is_read_off_the_last_token_however_packed(model_folder, family):
    loaded = load_model(str(model_folder(family)))
    choose_layout(loaded)
    attach_reward_head(loaded.model, loaded.head, seed=3)
    rng = np.random.default_rng(0)

    def example(p, *lengths):
        masks = [np.ones(n, bool) for n in lengths]
        return make_example(
            rng.integers(0, 300, p), [rng.integers(0, 300, n) for n in lengths], masks, "f"
        )

    examples = [example(7, 5, 9), example(3, 8, 2)]
    (together,) = make_batches(loaded, examples, 4096)
    scores = np.array(rewards(loaded, together))
    expected = []
    for e in together.examples:
        for ids in e.completions:
            with loaded.head.tapped() as tap:
                loaded.model(mx.array(np.concatenate([e.prompt, ids]))[None])
            expected.append(float(loaded.model.score(tap.hidden[0, -1])))
    assert np.allclose(scores, expected, atol=1e-5)


def test_a_reward_model_comes_back_with_its_head_and_its_statistics(reward_run, tmp_path):
    folder = reward_run()
    config = json.loads((folder / "adapter_config.json").read_text())
    record = json.loads((folder / "run.json").read_text())
    assert config["head"] == "reward" and config["reward"] == record["reward"]
    model = open_reward_model(folder)
    trained = mx.load(str(folder / "adapters.safetensors"))["score.weight"]
    assert mx.array_equal(model.loaded.model.score.weight, trained)
    # Normalised on the training data: its own rewards have mean 0 and deviation 1.
    examples = [json.loads(x) for x in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    both = [(r["prompt"], r[side]) for r in examples for side in ("chosen", "rejected")]
    scores = model.score(both)
    assert abs(scores.mean()) < 0.3 and 0.7 < scores.std() < 1.3
    rows = api.score(folder, tmp_path / "pairs.jsonl")
    assert [rows[0]["chosen_reward"], rows[0]["rejected_reward"]] == pytest.approx(
        scores[:2], abs=1e-5
    )
    raw = api.score(folder, tmp_path / "pairs.jsonl", raw=True)
    assert raw[0]["chosen_reward"] == pytest.approx(
        scores[0] * config["reward"]["std"] + config["reward"]["mean"], abs=1e-5
    )


def test_the_frozen_base_stays_and_only_the_head_learns(reward_run):
    folder = reward_run(fine_tune="head")
    weights = mx.load(str(folder / "adapters.safetensors"))
    assert list(weights) == ["score.weight"]
    assert json.loads((folder / "run.json").read_text())["trained_values"] == 64


def test_full_fine_tuning_keeps_the_head_with_the_weights(reward_run):
    folder = reward_run(fine_tune="full")
    assert open_reward_model(folder).score([(PROMPT, "So.")]).shape == (1,)


@pytest.mark.parametrize(
    "family",
    [
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "llama-untied",
        "mixtral",
        "qwen3_moe",
        "gemma2",
        "gemma3_text",
        "phi3",
        "smollm3",
        "olmo2",
    ],
)
def test_transformers_scores_the_same(reward_run, tmp_path, family):
    torch = pytest.importorskip("torch", reason="the scores are compared with torch's")
    transformers = pytest.importorskip("transformers")
    folder = reward_run(family)
    out = api.export_model(folder, "hf", dtype="float32")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        out, dtype=torch.float32
    )
    assert type(model).__name__.endswith("ForSequenceClassification") and model.num_labels == 1
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    statistics = json.loads((folder / "adapter_config.json").read_text())["reward"]
    answers = ["The quick brown fox.", "It jumps over the lazy dog, my friend, and bakes bread."]
    ours = open_reward_model(folder).score([(PROMPT, a) for a in answers])
    ours = ours * statistics["std"] + statistics["mean"]
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": a}],
            tokenize=False,
        )
        for a in answers
    ]
    ids = [tokenizer(t, add_special_tokens=False)["input_ids"] for t in texts]
    # One padded batch, as a user would send it.
    width, pad = max(map(len, ids)), model.config.pad_token_id
    batch = torch.tensor([i + [pad] * (width - len(i)) for i in ids])
    mask = torch.tensor([[1] * len(i) + [0] * (width - len(i)) for i in ids])
    with torch.no_grad():
        theirs = model(batch, attention_mask=mask).logits[:, 0].numpy()
    assert np.allclose(ours, theirs, atol=1e-4)


def test_what_is_no_reward_model_says_so(reward_run, model_folder, tmp_path):
    with pytest.raises(ModelError, match="is no reward model"):
        open_reward_model(model_folder())
    folder = reward_run()
    with pytest.raises(ModelError, match="it scores, it does not write"):
        api.generate(folder, ["Hi"])
    with pytest.raises(ExportError, match="use --to hf"):
        api.export_model(folder, "gguf")
    with pytest.raises(ModelError, match="cannot be the start"):
        api.train_model("dpo", model=str(folder), output=str(tmp_path / "x"))
    with pytest.raises(SettingsError, match="only reward models have"):
        api.train_model(
            "dpo", model=str(model_folder()), fine_tune="head", output=str(tmp_path / "y")
        )


def test_rows_that_are_too_long_are_left_out_not_cut(model_folder, tmp_path):
    """A score is read off the end, which a cut answer does not have."""
    data = write_pairs(tmp_path / "pairs.jsonl", 8)
    row = {"prompt": "Hi", "chosen": "bread " * 200, "rejected": "No"}
    data.write_text(data.read_text() + json.dumps(row) + "\n")
    run = api.train_model(
        "reward",
        model=str(model_folder()),
        data=str(data),
        output=str(tmp_path / "run"),
        max_length=150,
        steps=1,
    )
    report = json.loads((run.folder / "run.json").read_text())["data_report"]
    assert report["dropped"] == {"longer than the length limit of 150 tokens": 1}
    assert report["dropped_rows"][0][0].endswith("pairs.jsonl:9") and not report["changed"]
