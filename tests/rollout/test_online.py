"""Learning from samples: the prompt is shared, ratios start at 1, runs go on bit for bit."""

import json
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from train.test_loop import adapter, rows, same_bits, write_pairs

from mlx_align import api
from mlx_align.cli import main
from mlx_align.data.template import make_example
from mlx_align.errors import SettingsError
from mlx_align.losses import METHODS
from mlx_align.model import open as open_module
from mlx_align.model.adapter import AdapterSettings, wear_adapter
from mlx_align.model.forward import choose_layout
from mlx_align.model.load import load_model
from mlx_align.model.reward import open_reward_model
from mlx_align.rollout.groups import Sample, sample_groups
from mlx_align.rollout.lessons import PairTeacher
from mlx_align.rollout.roles import CriticRole, Reference, SharedRewardModel, open_shared
from mlx_align.rollout.rollouts import Rollout, Sampling
from mlx_align.train import loop
from mlx_align.train.config import RunSettings

PROMPTS = [[5, 6, 7, 8], [9, 10], [11]]
SAMPLING = {"max_tokens": 10, "temperature": 1.0}


def test_samples_are_those_of_the_model_token_by_token(loaded_model):
    """Their log-probabilities, from a separate pass over prompt and completion."""
    loaded = loaded_model()
    for temperature in (1.0, 0.7):
        groups = sample_groups(loaded, PROMPTS, 3, max_tokens=10, temperature=temperature, seed=1)
        assert [len(g) for g in groups] == [3, 3, 3]
        for prompt, group in zip(PROMPTS, groups, strict=True):
            for sample in group:
                ids = [*prompt, *sample.ids.tolist()]
                z = loaded.model(mx.array([ids]))[0].astype(mx.float32) / temperature
                logs = z - mx.logsumexp(z, axis=-1, keepdims=True)
                places = np.arange(len(prompt) - 1, len(ids) - 1)
                expected = np.array(logs)[places, sample.ids]
                assert np.allclose(sample.logp, expected, atol=1e-4)
                ends = loaded.tokenizer.eos_token_ids
                assert sample.finished == (int(sample.ids[-1]) in ends)
                assert not set(sample.ids[:-1].tolist()) & ends


def test_samples_differ_and_a_seed_repeats_them(loaded_model):
    loaded = loaded_model()
    first, again, other = (
        [s.ids.tolist() for g in sample_groups(loaded, PROMPTS, 4, **SAMPLING, seed=s) for s in g]
        for s in (1, 1, 2)
    )
    assert first == again and first != other
    assert len({tuple(x) for x in first[:4]}) > 1


def test_sampling_follows_the_adapter_at_once(loaded_model):
    loaded = loaded_model()
    worn = wear_adapter(loaded.model, AdapterSettings(), seed=0)
    cold = {"max_tokens": 12, "temperature": 1e-4, "seed": 0}
    before = sample_groups(loaded, PROMPTS, 1, **cold)
    moved = {
        n: x + 0.5 * mx.random.normal(x.shape, key=mx.random.key(3))
        for n, x in worn.weights().items()
    }
    worn.load(moved, "")
    after = sample_groups(loaded, PROMPTS, 1, **cold)
    assert [g[0].ids.tolist() for g in before] != [g[0].ids.tolist() for g in after]
    with worn.off():
        off = sample_groups(loaded, PROMPTS, 1, **cold)
    assert [g[0].ids.tolist() for g in before] == [g[0].ids.tolist() for g in off]


# -- runs -------------------------------------------------------------------------------------------


@pytest.fixture
def job(model_folder, tmp_path):
    data = tmp_path / "prompts.jsonl"
    data.write_text(
        "".join(json.dumps({"prompt": f"What is {i}?", "answer": str(i)}) + "\n" for i in range(12))
    )
    judge = tmp_path / "judge.py"
    judge.write_text(
        "def vowels(prompt, completion):\n    return sum(c in 'aeiou' for c in completion)\n"
    )

    def make(output, **changes):
        return {
            "model": str(model_folder("qwen2")),
            "data": str(data),
            "output": str(tmp_path / output),
            "reward": (f"{judge}:vowels",),
            "max_tokens": 8,
            "batch_size": 3,
            "steps": 4,
            "save_every": 2,
            "eval_every": 2,
            "learning_rate": 1e-2,
            "valid_share": 0.2,
            **changes,
        }

    return make


ONLINE = {n: m for n, m in METHODS.items() if m.data == "prompts"}
POLICY = [n for n, m in ONLINE.items() if m.advantage != "pairs"]


@pytest.mark.parametrize("name", POLICY)
def test_the_first_ratio_is_one(name, job):
    run = api.train_model(name, **job("run", steps=2, beta=0.05, iterations=1))
    for row in (r for r in rows(run.folder) if r["split"] == "train"):
        assert row["val/ratio"] == 1.0 and row["policy/approxkl_avg"] == 0.0
        assert row["clip_ratio/region_mean"] == 0.0
        assert row["sampling/logp_gap"] < 1e-4
        assert row["grad_norm"] > 0
    first = rows(run.folder)[1]
    assert first["kl"] == pytest.approx(0, abs=1e-6) and first["objective/kl"] == 0
    assert {"reward", "reward_std", "entropy", "completions/mean_length"} <= first.keys()
    samples = [json.loads(x) for x in (run.folder / "samples.jsonl").read_text().splitlines()]
    assert {s["step"] for s in samples} == {1, 2} and samples[0]["reward"] >= samples[1]["reward"]


@pytest.mark.parametrize("name", ONLINE)
def test_resumed_runs_are_the_unbroken_ones(name, job, tmp_path):
    settings = {"iterations": 2, "minibatches": 2, "beta": 0.05, "steps": 5}
    api.train_model(name, **job("whole", **settings))
    count = []
    api.train_model(
        name, **job("broken", **settings), should_stop=lambda: count.append(1) or len(count) == 3
    )
    api.train_model(name, resume=tmp_path / "broken")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert same_bits(adapter(whole), adapter(broken))
    assert (whole / "samples.jsonl").read_text() == (broken / "samples.jsonl").read_text()
    later = [r for r in rows(whole) if r["split"] == "train"][-1]
    assert name not in POLICY or later["policy/approxkl_avg"] > 0


@pytest.mark.parametrize("name", ONLINE)
def test_packs_change_nothing(name, job):
    runs = [
        api.train_model(name, **job(f"run-{n}", pack_length=n, steps=1)).folder for n in (16, 4096)
    ]
    a, b = (next(r for r in rows(f) if r["split"] == "train") for f in runs)
    assert a["reward"] == b["reward"]
    assert a["loss"] == pytest.approx(b["loss"], rel=1e-3, abs=1e-5)
    assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)


# -- PPO --------------------------------------------------------------------------------------------


@pytest.fixture
def reward_run(model_folder, tmp_path):
    """A reward model on the base that the policies of these tests have."""

    def make(**changes):
        data = write_pairs(tmp_path / "pairs.jsonl", 16)
        settings = {"model": str(model_folder("qwen2")), "steps": 4, "learning_rate": 1e-2}
        folder = tmp_path / f"rm{len(list(tmp_path.glob('rm*')))}"
        run = api.train_model(
            "reward", data=str(data), output=str(folder), **{**settings, **changes}
        )
        return run.folder

    return make


def test_four_models_stand_on_one_base(job, reward_run, monkeypatch):
    """Policy, critic, reward model and reference; the base is loaded once."""
    folder, loads = reward_run(), []
    original = loop.load_model
    for module in (loop, open_module):
        monkeypatch.setattr(
            module, "load_model", lambda *a, **k: loads.append(1) or original(*a, **k)
        )
    run = api.train_model("ppo", **job("run", reward=(str(folder),), steps=2))
    assert len(loads) == 1
    row = rows(run.folder)[1]
    assert {"critic/explained_variance", "loss/value_avg", "objective/kl"} <= row.keys()
    # The policy's adapter alone is what the run leaves: no head, nothing of the critic.
    assert not any("score" in name for name in adapter(run.folder))


def test_the_shared_reward_model_scores_as_it_does_alone(job, reward_run, loaded_model):
    folder = reward_run()
    loaded = load_model(job("x")["model"])
    choose_layout(loaded)
    settings = RunSettings.from_flat("ppo", job("x"), "test")
    policy = wear_adapter(loaded.model, AdapterSettings(), seed=0)
    moved = {n: x + 0.3 for n, x in policy.weights().items()}
    policy.load(moved, "")
    ground = SimpleNamespace(settings=settings, loaded=loaded, adapter=policy)
    pairs = [("What is it?", "bread and salt"), ("Why?", "the quick brown fox")]
    shared = open_shared(ground, str(folder))
    assert isinstance(shared, SharedRewardModel)
    assert np.allclose(shared.score(pairs), open_reward_model(folder).score(pairs), atol=1e-4)
    # Afterwards the policy is what it was.
    assert same_bits(policy.weights(), moved) and "score" not in loaded.model


def test_memory_of_four_models_is_little_more_than_one(job, reward_run, loaded_model):
    folder = reward_run()
    loaded = load_model(job("x")["model"])
    choose_layout(loaded)
    base = sum(x.nbytes for _, x in tree_flatten(loaded.model.parameters()))
    settings = RunSettings.from_flat("ppo", job("x", lora_rank=1), "test")
    policy = wear_adapter(loaded.model, settings.adapter, seed=0)
    ground = SimpleNamespace(settings=settings, loaded=loaded, adapter=policy)
    mx.eval(policy.parameters())
    before = mx.get_active_memory()
    shared = open_shared(ground, str(folder))
    critic = CriticRole(ground, None)
    roles = [policy, shared.adapter, critic.adapter]
    own = sum(a.nbytes for r in roles for _, _, l, _ in r.layers for a in (l.lora_a, l.lora_b))
    assert mx.get_active_memory() - before < own + 0.05 * base


def test_the_critic_starts_as_the_reward_model_where_it_can(job, reward_run):
    folder = reward_run()
    trained = adapter(folder)
    for rank, same in ((8, True), (4, False)):
        loaded = load_model(job("x")["model"])
        choose_layout(loaded)
        settings = RunSettings.from_flat("ppo", job("x", lora_rank=rank), "test")
        policy = wear_adapter(loaded.model, settings.adapter, seed=0)
        ground = SimpleNamespace(settings=settings, loaded=loaded, adapter=policy)
        shared = open_shared(ground, str(folder))
        critic = CriticRole(ground, shared)
        with policy.replaced_by(critic.adapter):
            weights = critic.adapter.weights()
        name = next(n for n in trained if n.endswith("lora_b"))
        assert mx.array_equal(weights[name], trained[name]) == same
        if same:
            expected = trained["score.weight"] / shared.model.std
            assert mx.allclose(weights["score.weight"], expected)


def test_the_kl_coefficient_is_steered_and_kept(job, tmp_path):
    settings = {"kl_target": 0.001, "steps": 6, "beta": 0.1}
    run = api.train_model("ppo", **job("whole", **settings))
    betas = [r["beta"] for r in rows(run.folder) if r["split"] == "train"]
    assert betas[0] == 0.1 and len(set(betas)) > 3
    count = []
    api.train_model(
        "ppo", **job("broken", **settings), should_stop=lambda: count.append(1) or len(count) == 3
    )
    api.train_model("ppo", resume=tmp_path / "broken")
    assert betas == [r["beta"] for r in rows(tmp_path / "broken") if r["split"] == "train"]


def test_unfinished_completions_can_be_left_out(job):
    run = api.train_model("grpo", **job("run", steps=2, max_tokens=3, mask_unfinished=True))
    row = rows(run.folder)[1]
    assert row["completions/clipped_ratio"] > 0.5
    nothing = api.train_model("grpo", **job("other", steps=1, max_tokens=1, mask_unfinished=True))
    row = rows(nothing.folder)[1]
    assert row["completions/clipped_ratio"] == 1 and row["grad_norm"] == 0


def test_dynamic_sampling_replaces_prompts_that_teach_nothing(job, tmp_path):
    judge = tmp_path / "rare.py"
    judge.write_text(
        "def rare(prompt, completion):\n    return ('a' in completion) if int(prompt[8:-1]) % 2 else 1.0\n"
    )
    plain, dynamic = (
        rows(
            api.train_model(
                "grpo",
                **job(
                    f"run{d}", reward=(f"{judge}:rare",), dynamic_sampling=d, batch_size=6, steps=2
                ),
            ).folder
        )[1]
        for d in (False, True)
    )
    assert plain["frac_reward_zero_std"] > dynamic["frac_reward_zero_std"]
    assert dynamic["rollout/prompts_filtered"] >= 1


def test_going_on_from_a_run_holds_to_that_run(job, tmp_path):
    api.train_model("grpo", **job("first"))
    second = api.train_model(
        "grpo", **job("second", model=str(tmp_path / "first"), beta=0.1, steps=1)
    )
    row = rows(second.folder)[1]
    assert row["objective/kl"] == pytest.approx(0, abs=1e-4)
    held_to_base = api.train_model(
        "grpo",
        **job(
            "third", model=str(tmp_path / "first"), reference=job("x")["model"], beta=0.1, steps=1
        ),
    )
    assert abs(rows(held_to_base.folder)[1]["objective/kl"]) > 1e-3


def test_a_reward_is_needed_and_one_that_fits(job):
    with pytest.raises(SettingsError, match="say what completions are rewarded by"):
        api.train_model("grpo", **job("a", reward=()))
    with pytest.raises(SettingsError, match="which no row has"):
        api.train_model("grpo", **job("b", reward=("exact:solution",)))
    with pytest.raises(SettingsError, match=r"the reference is gone"):
        api.train_model("grpo", **job("c", fine_tune="full", beta=0.1))


# -- comparisons ------------------------------------------------------------------------------------


def test_pairs_are_the_best_and_the_worst_of_a_prompt(job):
    run = api.train_model("online-dpo", **job("run", steps=2, group_size=4))
    first, second = (r for r in rows(run.folder) if r["split"] == "train")
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-5)  # the policy still is the reference
    assert first["objective/kl"] == pytest.approx(0, abs=1e-3) and 0 < first["rollout/share"] < 1
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-5) and second["rewards/margins"] != 0
    assert {"logps/chosen", "objective/entropy", "reward", "beta"} <= first.keys()


def test_prompts_rewarded_alike_make_no_pair(job, tmp_path):
    judge = tmp_path / "flat.py"
    judge.write_text("def flat(prompt, completion):\n    return 1.0\n")
    settings = job("run", steps=2, reward=(f"{judge}:flat",))
    run = api.train_model("online-dpo", **settings)
    assert [r["loss"] for r in rows(run.folder) if r["split"] == "train"] == [0.0, 0.0]
    assert not any(x.any() for n, x in adapter(run.folder).items() if n.endswith("lora_b"))


def make_ground(name, settings):
    """A policy that has moved away from its start, and its reference."""
    loaded = load_model(settings["model"])
    choose_layout(loaded)
    run = RunSettings.from_flat(name, settings, "test")
    policy = wear_adapter(loaded.model, AdapterSettings(), seed=0)
    moved = {
        n: x + 0.5 * mx.random.normal(x.shape, key=mx.random.key(3))
        for n, x in policy.weights().items()
    }
    policy.load(moved, "")
    ground = SimpleNamespace(settings=run, loaded=loaded, adapter=policy)
    return ground, Reference(ground)


@pytest.mark.parametrize("name", ["xpo", "nash-md"])
def test_the_second_sample_is_the_opponents(name, job):
    """Its log-probabilities are those of the reference, or of the mixture of both."""
    ground, reference = make_ground(name, job("x", temperature=0.7))
    sampling = Sampling(ground.loaded, ground.settings.method, [], reference)
    drawn = []
    sampling.rewarded = lambda prompts, groups, own: drawn.extend(groups) or own
    prompts = [SimpleNamespace(prompt=np.array(p)) for p in PROMPTS]
    assert sampling.step(prompts, 5) == 1

    def log_probs(ids):
        return ground.loaded.model(mx.array([ids]))[0].astype(mx.float32)

    for prompt, (mine, theirs) in zip(PROMPTS, drawn, strict=True):
        for sample, share in ((mine, 0.0), (theirs, 1.0 if name == "xpo" else 0.5)):
            ids = [*prompt, *sample.ids.tolist()]
            own = log_probs(ids)
            with reference.worn():
                z = ((1 - share) * own + share * log_probs(ids)) / 0.7
            logs = np.array(z - mx.logsumexp(z, axis=-1, keepdims=True))
            places = np.arange(len(prompt) - 1, len(ids) - 1)
            assert np.allclose(sample.logp, logs[places, sample.ids], atol=1e-3)


def test_a_judge_decides(job, model_folder):
    judge = f"judge:{model_folder('llama')}"
    run = api.train_model("online-dpo", **job("run", steps=1, reward=(judge,), watch=(judge,)))
    first = rows(run.folder)[0]
    assert first["split"] == "valid" and first["watch"] == 0.5  # against the start's own answers
    row = rows(run.folder)[1]
    assert row["reward"] == pytest.approx(0.5)  # what one wins the other loses
    nash = api.train_model("nash-md", **job("nash", steps=1, reward=(judge,)))
    assert rows(nash.folder)[1]["rewards/probabilities"] == rows(nash.folder)[1]["reward"]


def test_a_judge_gives_shares_and_other_rewards_utilities(job):
    ground, reference = make_ground("nash-md", job("x"))
    samples = [Sample(np.array([5, 6]), np.array([-1.0, -2.0]), True) for _ in range(2)]
    prompt = make_example([1, 2], [[5]], [[True]], "here")
    rollout = Rollout(
        [prompt] * 2, [samples] * 2, [["a", "b"]] * 2, np.array([[1.0, 0.0], [0.5, 0.5]]), {}, 1
    )
    for judged, edge in ((True, 0.5), (False, 1 / (1 + np.exp(-1)) - 0.5)):
        lessons, _ = PairTeacher(ground, reference, judged).teach(rollout, 0.1)
        told = np.concatenate([part.advantage for part in lessons[0].policy])
        assert np.allclose(told, [edge, edge, 0, 0])


# -- where samples end, and what is watched -----------------------------------------------------------


def test_a_text_ends_a_completion(loaded_model):
    loaded = loaded_model()
    decode = loaded.tokenizer.decode
    free = [g[0] for g in sample_groups(loaded, PROMPTS, 1, **SAMPLING, seed=4)]
    texts = [decode(s.ids.tolist()) for s in free]
    ends = [text[3:5] for text in texts]
    held = [g[0] for g in sample_groups(loaded, PROMPTS, 1, **SAMPLING, seed=4, stop=ends)]
    for text, sample, whole in zip(texts, held, free, strict=True):
        said = decode(sample.ids.tolist())
        assert sample.finished and any(end in said for end in ends)
        # Up to there it is the same sample, and one token less has no such text.
        assert sample.ids.tolist() == whole.ids[: len(sample.ids)].tolist()
        assert not any(end in decode(sample.ids[:-1].tolist()) for end in ends)
        assert len(sample.logp) == len(sample.ids) and text.startswith(said)


def test_rewards_do_not_see_the_text_that_ends(job, tmp_path):
    seen, spy = tmp_path / "seen.txt", tmp_path / "spy.py"
    spy.write_text(
        "def spy(prompt, completion, finished):\n"
        f"    open({str(seen)!r}, 'a').write(repr((completion, finished)) + '\\n')\n"
        "    return 1.0 * len(completion)\n"
    )
    stop = tuple("aeiou ")
    api.train_model("grpo", **job("run", reward=(f"{spy}:spy",), stop=stop, steps=1))
    said = [eval(line) for line in seen.read_text().splitlines()]
    assert not any(end in text for text, _ in said for end in stop)
    assert any(finished for _, finished in said)


def test_cut_sampling_is_warned_of(job, caplog):
    api.train_model("grpo", **job("run", steps=1, top_k=5))
    assert "the gradient is biased" in caplog.text


def test_watched_rewards_are_measured_and_choose_the_best(job, tmp_path):
    judge = tmp_path / "watch.py"
    judge.write_text("def letters(prompt, completion):\n    return -float(len(completion))\n")
    settings = job("run", watch=(f"{judge}:letters*0.5",), steps=4, eval_every=1)
    run = api.train_model("grpo", **settings)
    held_out = [r for r in rows(run.folder) if r["split"] == "valid"]
    for row in held_out:
        assert row["watch"] == pytest.approx(0.5 * row["watch/watch.py:letters/mean"])
        assert row["watch_error"] >= 0 and "reward" in row
    best = max(held_out[1:], key=lambda r: r["watch"])
    assert run.best_step == best["step"] and run.monitor == ("watch", True)


def test_rewards_are_held_at_the_clip_and_fragments_cost(job):
    plain, clipped, fined = (
        rows(api.train_model("grpo", **job(f"run{i}", steps=1, max_tokens=3, **changes)).folder)[1]
        for i, changes in enumerate(({}, {"reward_clip": 0.5}, {"unfinished_penalty": 2.0}))
    )
    assert clipped["reward"] <= 0.5 and clipped["rewards/clipped_ratio"] > 0
    fine = 2.0 * plain["completions/clipped_ratio"]
    assert fined["reward"] == pytest.approx(plain["reward"] - fine)


def test_a_hacked_reward_stops_the_run(job, tmp_path, caplog):
    """The reward pays for what the watched one charges for."""
    watch = tmp_path / "watch.py"
    watch.write_text(
        "def fewer(prompt, completion):\n    return -sum(c in 'aeiou' for c in completion)\n"
    )
    changes = {"watch": (f"{watch}:fewer",), "stop_on_hacking": True, "eval_every": 4}
    settings = job("run", steps=40, batch_size=8, learning_rate=3e-2, valid_share=0.4, **changes)
    run = api.train_model("grpo", **settings)
    assert run.stopped and not run.finished and run.steps < 40
    assert "The reward" in caplog.text and (run.folder / "checkpoints" / "best").is_dir()
    again = api.train_model("grpo", resume=run.folder)
    assert again.finished and not again.stopped


def test_the_reward_climbs_on_the_demo(tmp_path):
    run = api.train_model("grpo", output=tmp_path / "run", steps=16)
    assert run.before["reward"] < 0.7 and run.after["reward"] > 0.85


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "Say it", "input": ""},
        {"conversations": [{"from": "human", "value": "Say it"}, {"from": "gpt", "value": "gold"}]},
        {
            "messages": [
                {"role": "user", "content": "Say it"},
                {"role": "assistant", "content": "gold"},
            ]
        },
        {"prompt": "Say it", "chosen": "gold", "rejected": "tin"},
    ],
)
def test_rewards_see_what_the_policy_was_asked(job, tmp_path, row):
    data, seen = tmp_path / "rows.jsonl", tmp_path / "seen.txt"
    data.write_text((json.dumps(row) + "\n") * 3)
    judge = tmp_path / "spy.py"
    judge.write_text(
        "def spy(prompt, completion):\n"
        f"    open({str(seen)!r}, 'a').write(repr(prompt) + '\\n')\n    return 1.0 * len(completion)\n"
    )
    api.train_model(
        "grpo", **job("run", data=str(data), reward=(f"{judge}:spy",), steps=1, valid_share=0.0)
    )
    for line in seen.read_text().splitlines():
        assert "Say it" in line and "gold" not in line


def test_a_reward_that_fails_loses_nothing(job, tmp_path, capsys):
    """The error names the sample; what was learnt is kept, and the run goes on when it is mended."""
    code = tmp_path / "fragile.py"
    code.write_text(
        "from pathlib import Path\n"
        "calls = []\n"
        "def fragile(prompts, completions):\n"
        "    calls.append(1)\n"
        f"    if len(calls) > 4 and not Path({str(tmp_path / 'mended')!r}).exists():\n"
        "        raise ValueError('the service is down')\n"
        "    return [sum(c in 'aeiou' for c in text) for text in completions]\n"
    )
    changes = {"reward": (f"{code}:fragile",), "steps": 5, "save_every": 50, "eval_every": 0}
    flags = [x for n, v in job("broken", **changes).items() for x in
             ("--" + n.replace("_", "-"), ",".join(v) if isinstance(v, tuple) else str(v))]  # fmt: skip
    with pytest.raises(SystemExit) as end:
        main(["grpo", *flags])
    said = capsys.readouterr().err
    assert end.value.code == 1 and "the service is down" in said and "fragile.py, line 6" in said
    assert "What is" in said and f"mlx-align grpo --resume {tmp_path / 'broken'}" in said
    (tmp_path / "mended").touch()
    with pytest.raises(SystemExit) as end:
        main(["grpo", "--resume", str(tmp_path / "broken")])
    assert end.value.code == 0
    api.train_model("grpo", **job("whole", **changes))
    assert same_bits(adapter(tmp_path / "whole"), adapter(tmp_path / "broken"))


def test_online_methods_can_be_swept(job, tmp_path):
    sweep = api.sweep("grpo", **job("sweep", learning_rate=[1e-3, 1e-2], steps=1))
    assert sweep.metric == "reward" and len(sweep.trials) == 2
