"""Rewards by name, users' functions in both forms, and what is said when one goes wrong."""

import sys
import threading
import time

import mlx.core as mx
import numpy as np
import pytest

from mlx_align.errors import ModelError, SettingsError
from mlx_align.rollout.rewards import (
    FunctionReward,
    ModelReward,
    Request,
    Reward,
    RewardError,
    VerifierReward,
    check_columns,
    combine,
    parse_rewards,
    with_absolute_path,
)

nan = float("nan")


def request(completion="18", prompt="What is 9 * 2?", tokens=3, origin="", finished=True, **row):
    return Request(prompt, completion, row, finished, tokens, origin)


def one(function, **options):
    (reward,) = parse_rewards([function], **options)
    return reward


@pytest.fixture
def user_file(tmp_path):
    def write(text, name="my_rewards.py"):
        file = tmp_path / name
        file.write_text(text)
        return file

    return write


# -- by name ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec,name,weight",
    [
        ("gsm8k", "gsm8k", 1),
        ("gsm8k*2", "gsm8k", 2),
        (" gsm8k * -0.5 ", "gsm8k", -0.5),
        ("gsm8k*.5", "gsm8k", 0.5),
        ("length:max=200*1e-3", "length:max=200", 1e-3),
        (r"regex:\d*", r"regex:\d*", 1),
        (r"regex:\d*x", r"regex:\d*x", 1),
        (r"regex:\d*2", r"regex:\d", 2),
        (r"regex:\d*2*1", r"regex:\d*2", 1),
        ("regex_full:a", "regex_full:a", 1),
    ],
)
def test_verifiers_with_weights(spec, name, weight):
    (reward,) = parse_rewards([spec])
    assert isinstance(reward, VerifierReward) and isinstance(reward, Reward)
    assert (reward.name, reward.weight) == (name, weight)


def test_a_pattern_keeps_its_commas_and_colons():
    (reward,) = parse_rewards([r"regex:a{1,2}: b=\d*2"])
    assert reward.verifier.pattern == r"a{1,2}: b=\d" and reward.weight == 2


def test_functions_of_a_file(user_file):
    file = user_file(
        "import os\n"
        "CALLS = []\n"
        "def long_one(completions, **kwargs):\n    return [len(c) for c in completions]\n"
        "def right(completion, answer):\n    CALLS.append(1)\n    return completion == answer\n"
        "def calls(completion):\n    return len(CALLS)\n"
    )
    rewards = parse_rewards([f"{file}:long_one*0.5", f"{file}:right", f"{file}:calls*0"])
    assert [r.name for r in rewards] == [
        f"my_rewards.py:{n}" for n in ("long_one", "right", "calls")
    ]
    assert [r.weight for r in rewards] == [0.5, 1, 0]
    scored = combine(rewards, [request("18", answer="18"), request("no", answer="18")])
    assert scored.total.tolist() == [2, 1]
    # One file is run once: its functions share what it holds.
    assert scored.rewards["my_rewards.py:calls"].tolist() == [2, 2]


def test_a_file_may_import_its_neighbours_and_nothing_stays_behind(user_file):
    user_file("TEN = 10\n", "neighbour_of_rewards.py")
    file = user_file(
        "from dataclasses import dataclass\nfrom neighbour_of_rewards import TEN\n"
        "@dataclass\nclass Answer:\n    text: 'str'\n"
        "def f(completion):\n    return TEN\n"
    )
    before = list(sys.path)
    assert parse_rewards([f"{file}:f"])[0]([request()]) == [10]
    assert sys.path == before


def test_reward_models(tmp_path):
    class Model:
        def score(self, pairs):
            assert pairs == [("q", "long"), ("q", " ")]
            return np.array([2.0, -1.0])

    folder = tmp_path / "my-reward"
    folder.mkdir()
    opened = []
    (reward,) = parse_rewards([f"{folder}*3"], open_model=lambda f: opened.append(f) or Model())
    assert opened == [str(folder)]
    assert isinstance(reward, ModelReward) and (reward.name, reward.weight) == ("my-reward", 3)
    assert combine([reward], [request("long", "q"), request("", "q")]).total.tolist() == [6, -3]
    assert reward([]) == []


def test_a_reward_model_of_a_run(model_folder, tmp_path):
    from mlx_align.model.adapter import AdapterSettings, wear_adapter
    from mlx_align.model.heads import attach_reward_head
    from mlx_align.model.load import load_model

    base = str(model_folder())
    loaded = load_model(base)
    attach_reward_head(loaded.model, loaded.head, seed=3)
    settings = AdapterSettings()
    (tmp_path / "run").mkdir()
    extra = {"model": base, "head": "reward", "reward": {"mean": 0.5, "std": 2.0}}
    wear_adapter(loaded.model, settings, seed=0).save(tmp_path / "run", settings, extra)
    (reward,) = parse_rewards([str(tmp_path / "run")])
    messages = ({"role": "user", "content": "Bread?"},)
    values = reward([request("Bake it.", messages), request("", "And now?"), request(" \n", "So?")])
    assert len(values) == 3 and np.isfinite(values).all()
    with pytest.raises(ModelError, match="is no reward model"):
        parse_rewards([base])


@pytest.mark.parametrize(
    ("spec", "absolute"),
    [
        ("gsm8k*2", "gsm8k*2"),
        ("length:max=3", "length:max=3"),
        ("mine.py:good*0.5", "{}/mine.py:good*0.5"),
        ("other.py:good", "other.py:good"),
        ("rm", "{}/rm"),
        ("./rm * 2", "{}/rm * 2"),
        ("judge:rm*2", "judge:{}/rm*2"),
        ("judge:owner/model", "judge:owner/model"),
    ],
)
def test_names_hold_from_anywhere(tmp_path, monkeypatch, spec, absolute):
    (tmp_path / "mine.py").touch()
    for folder in ("rm", "gsm8k"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path)
    assert with_absolute_path(spec) == absolute.format(tmp_path)


def test_functions_and_rewards_stand_for_themselves():
    def shortness(completions):
        return [-len(c) for c in completions]

    class Mine:
        name, weight = "mine", 2.0

        def __call__(self, requests):
            return [1.0] * len(requests)

    scored = combine(parse_rewards([shortness, Mine(), "length:9"]), [request("abc")])
    assert scored.total.tolist() == [-3 + 2 + 1]
    assert list(scored.rewards) == ["shortness", "mine", "length:9"]


def test_rewards_of_one_name_are_told_apart():
    def f(completion):
        return 1

    assert [r.name for r in parse_rewards([f, f, "gsm8k", f])] == ["f", "f-2", "gsm8k", "f-3"]


@pytest.mark.parametrize(
    "spec,words",
    [
        ("gsm9k", r"reward 'gsm9k': is no verifier, file or folder \(did you mean 'gsm8k'\?\)"),
        ("runs/none", r"a reward model is the run folder"),
        ("gsm8k*many", r"the weight behind \* must be a number, not 'many'"),
        ("gsm8k*1e999", r"its weight is too large"),
        ("gsm8k:colum=a", r"gsm8k: no option 'colum' \(did you mean 'column'\?\)"),
        ("none.py:f", r"there is no file none.py"),
        ("{file}", r"which function\? Write .*my_rewards.py:NAME; it has: correct, helper"),
        (
            "{file}:corect",
            r"has no function 'corect' \(did you mean 'correct'\?\); it has: correct,",
        ),
        ("{file}:dumps", r"takes \(obj, "),
        ("{file}:LIMIT", r"has no function 'LIMIT'"),
        ("gsm8k*0", r"no reward has a weight"),
    ],
)
def test_what_cannot_be_understood(user_file, spec, words):
    file = user_file(
        "from json import dumps\nLIMIT = 3\n"
        "def correct(completion):\n    return 1\ndef helper(x):\n    return x\ndef _own():\n    pass\n"
    )
    with pytest.raises((SettingsError, RewardError), match=words):
        parse_rewards([spec.format(file=file)])


def test_no_reward_is_refused():
    with pytest.raises(SettingsError, match="nothing to learn"):
        parse_rewards([])


@pytest.mark.parametrize(
    "text,words",
    [
        ("def f(:\n", r"cannot be loaded: raised SyntaxError: .*line 1"),
        (
            "import nothing_of_this_name\n",
            r"raised ModuleNotFoundError: .*\(my_rewards.py, line 1\)",
        ),
        ("x = 1\ny = 1 / 0\n", r"raised ZeroDivisionError: .*\(my_rewards.py, line 2\)"),
        ("import sys\nsys.exit(3)\n", r"raised SystemExit: 3"),
    ],
)
def test_files_that_do_not_run(user_file, text, words):
    file = user_file(text)
    before = set(sys.modules), list(sys.path)
    with pytest.raises(RewardError, match=words):
        parse_rewards([f"{file}:f"])
    assert (set(sys.modules), list(sys.path)) == before


# -- both forms ------------------------------------------------------------------------------------

ROWS = [
    {"prompt": "in the row", "answer": "18", "level": 1},
    {"prompt": "in the row", "answer": "7"},
]
REQUESTS = [
    Request("Q1", "18", ROWS[0], True, 2, "a.jsonl:1"),
    Request(({"role": "user", "content": "Q2"},), "8", ROWS[1], False, 1, "a.jsonl:2"),
]


def test_a_batched_function_gets_every_column_as_a_list():
    seen = {}

    def f(prompts, completions, **columns):
        seen.update(prompts=prompts, completions=completions, **columns)
        return [True, None]

    assert one(f)(REQUESTS) == [1.0, None]
    assert seen == {
        "prompts": ["Q1", [{"role": "user", "content": "Q2"}]],
        "completions": ["18", "8"],
        "answer": ["18", "7"],
        "level": [1, None],
        "finished": [True, False],
        "tokens": [2, 1],
    }


def test_a_function_of_one_gets_its_row():
    seen = []

    def f(prompt, completion, **columns):
        seen.append((prompt, completion, columns))
        return len(completion)

    assert one(f)(REQUESTS) == [2.0, 1.0]
    assert seen[0] == ("Q1", "18", {"answer": "18", "level": 1, "finished": True, "tokens": 2})
    assert seen[1][2] == {"answer": "7", "level": None, "finished": False, "tokens": 1}


def test_only_what_is_named_is_passed():
    def batched(completions, answer, level=None, other="own"):
        assert other == "own"
        return [c == a for c, a in zip(completions, answer, strict=True)]

    def single(completion, answer, *, tokens, other="own"):
        assert other == "own"
        return (completion == answer) + tokens / 10

    assert one(batched)(REQUESTS) == [1, 0]
    assert one(single)(REQUESTS) == [1.2, 0.1]
    assert one(batched).columns == one(single).columns == ("answer",)


def test_a_column_that_this_batch_lacks_is_none():
    def batched(completions, hint):
        return [0.0 if h is None else 1.0 for h in hint]

    def single(completion, hint):
        return hint is None

    assert one(batched)(REQUESTS) == [0, 0]
    assert one(single)(REQUESTS) == [1, 1]


def test_changing_a_prompt_does_not_change_the_data():
    def f(prompt, completion):
        if not isinstance(prompt, str):
            prompt.append(1)
            prompt[0]["content"] = ""
        return 0

    one(f)(REQUESTS)
    assert REQUESTS[1].prompt == ({"role": "user", "content": "Q2"},)


def test_no_requests_no_call():
    def f(completions):
        raise AssertionError

    assert one(f)([]) == []


def test_async_functions():
    async def batched(completions):
        return [float(len(c)) for c in completions]

    async def single(completion):
        return len(completion)

    for f in (batched, single):
        for timeout in (0, 60):
            assert one(f, timeout=timeout)(REQUESTS) == [2, 1]


def test_callable_objects():
    class Judge:
        def __call__(self, completions, scale=2):
            return [scale * len(c) for c in completions]

    reward = one(Judge())
    assert reward.name == "Judge" and reward(REQUESTS) == [4, 2]


@pytest.mark.parametrize(
    "values",
    [
        (1, 0.5),
        np.array([1, 0.5]),
        np.array([1, 0.5], np.float16),
        [np.int64(1), np.float32(0.5)],
        [np.True_, mx.array(0.5)],
        mx.array([1, 0.5]),
    ],
)
def test_numbers_of_any_kind(values):
    def f(completions):
        return values

    assert one(f)(REQUESTS) == [1.0, 0.5]


def test_lazy_mlx_results_are_read_where_they_were_made():
    def f(completions):
        return mx.array([float(len(c)) for c in completions]) + 1

    assert one(f)(REQUESTS) == [3.0, 2.0]


@pytest.mark.parametrize(
    "function,words",
    [
        (lambda text: 1, r"takes \(text\)\. A reward function takes completions"),
        (lambda completion, completions: 1, "takes"),
        (lambda **anything: 1, "takes"),
        (lambda prompt, completions: 1, "mixes the two forms"),
        (lambda prompts, completion: 1, "mixes the two forms"),
        (print, "takes|cannot be read"),
    ],
)
def test_functions_that_take_something_else(function, words):
    with pytest.raises(RewardError, match=words):
        parse_rewards([function])


# -- what goes wrong -------------------------------------------------------------------------------


def test_an_exception_names_the_function_the_place_and_the_prompt(user_file):
    file = user_file("import json\ndef f(completion):\n    return json.loads(completion)['a']\n")
    reward = one(f"{file}:f")
    long = "How many  eggs\ndo the ducks lay? " * 9
    with pytest.raises(RewardError) as caught:
        reward([request('{"a": 1}'), request("no", prompt=long, origin="eggs.jsonl:7")])
    text = str(caught.value)
    assert text.startswith(
        "reward my_rewards.py:f: raised JSONDecodeError: Expecting value: line 1"
    )
    assert (
        "(my_rewards.py, line 3), at eggs.jsonl:7, prompt 'How many eggs do the ducks lay? How"
        in text
    )
    assert "…'" in text and "\n" not in text and len(text) < 300
    assert isinstance(caught.value.__cause__, ValueError)


def test_an_exception_in_a_batch_says_which_batch():
    def f(completions):
        return [1 / 0]

    with pytest.raises(
        RewardError, match=r"in a batch of 2 that begins with at a.jsonl:1, prompt 'Q1'"
    ):
        one(f)(REQUESTS)
    with pytest.raises(RewardError, match=r"at a.jsonl:2, prompt 'Q2'"):
        one(f)(REQUESTS[1:])


@pytest.mark.parametrize("timeout", [0, 60])
def test_a_function_that_exits_does_not_end_the_run(timeout):
    def f(completion):
        sys.exit("enough")

    with pytest.raises(RewardError, match="raised SystemExit: enough"):
        one(f, timeout=timeout)(REQUESTS)


@pytest.mark.parametrize("timeout", [0, 60])
def test_an_interrupt_stays_an_interrupt(timeout):
    def f(completion):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        one(f, timeout=timeout)(REQUESTS)


def test_a_late_function_is_left_behind():
    go_on = threading.Event()

    def f(completions):
        go_on.wait(30)
        return [1, 1]

    start = time.perf_counter()
    with pytest.raises(
        RewardError, match=r"f: no result after 0.05 seconds, in a batch of 2 .* faster"
    ):
        one(f, timeout=0.05)(REQUESTS)
    assert time.perf_counter() - start < 5
    go_on.set()


def test_a_timeout_of_the_function_itself_is_its_own_exception():
    def f(completions):
        raise TimeoutError("server")

    with pytest.raises(RewardError, match="raised TimeoutError: server"):
        one(f)(REQUESTS)


def test_timeout_0_stays_in_the_calling_thread():
    def f(completion):
        return threading.current_thread() is threading.main_thread()

    assert one(f, timeout=0)(REQUESTS) == [1, 1]
    assert one(f)(REQUESTS) == [0, 0]


def test_arrays_of_another_thread_get_advice():
    def f(completion):
        raise RuntimeError("There is no Stream(gpu, 0) in current thread.")

    with pytest.raises(
        RewardError, match=r"belong to their thread: give rewards a time limit of 0"
    ):
        one(f)(REQUESTS)


def test_lazy_arrays_of_the_main_thread_need_timeout_0():
    scale = mx.array(2.0) + mx.array(1.0)

    def f(completion):
        return scale * len(completion)

    assert one(f, timeout=0)(REQUESTS) == [6, 3]


@pytest.mark.parametrize(
    "values,words",
    [
        ([1], r"returned 1 numbers for 2 completions, at a.jsonl:1, prompt 'Q1' and so on"),
        ([1, 2, 3], r"returned 3 numbers"),
        (None, r"returned None for 2 completions; it must return a list"),
        (0.5, r"returned 0.5 for 2 completions"),
        ({"a": 1}, r"must return a list"),
        ([1, nan], r"returned nan, at a.jsonl:2, prompt 'Q2'; it must be a finite number"),
        ([float("inf"), 1], r"returned inf, at a.jsonl:1"),
        ([10**400, 1], r"returned 1000+…, at a.jsonl:1"),
        (["1", 1], r"returned '1', at a.jsonl:1"),
        ([[1], [2]], r"returned \[1\], at a.jsonl:1"),
        (np.array([[1.0], [2.0]]), r"returned \[1.0\], at a.jsonl:1"),
    ],
)
def test_what_is_no_reward_is_refused(values, words):
    def f(completions):
        return values

    with pytest.raises(RewardError, match=words):
        one(f)(REQUESTS)


def test_where_the_origin_is_unknown_the_position_is_named():
    def f(completion):
        return nan if completion == "b" else 0

    with pytest.raises(RewardError, match=r"at completion 2 of 3, prompt 'What is 9"):
        one(f)([request("a"), request("b"), request("c")])


# -- together --------------------------------------------------------------------------------------


def fixed(name, weight, *values):
    return FunctionReward(name, lambda completions: list(values), weight)


def test_rewards_are_weighed_and_what_does_not_apply_is_left_out():
    rewards = [fixed("a", 2.0, 1, None, None, 0), fixed("b", -0.5, 1, 2, None, None)]
    scored = combine(rewards, [request()] * 4)
    assert scored.total.dtype == np.float64
    np.testing.assert_array_equal(scored.total, [1.5, -1, nan, 0])
    np.testing.assert_array_equal(scored.rewards["a"], [1, nan, nan, 0])
    np.testing.assert_array_equal(scored.rewards["b"], [1, 2, nan, nan])


def test_a_reward_of_weight_0_is_only_reported():
    scored = combine([fixed("a", 1.0, 1, None), fixed("watched", 0.0, 5, 5)], [request()] * 2)
    np.testing.assert_array_equal(scored.total, [1, nan])
    assert scored.rewards["watched"].tolist() == [5, 5]


def test_rewards_from_elsewhere_are_checked_too():
    class Broken:
        name, weight = "broken", 1.0

        def __call__(self, requests):
            return [nan]

    with pytest.raises(RewardError, match="broken: returned nan"):
        combine([Broken()], [request()])
    with pytest.raises(SettingsError, match="two rewards are called 'a'"):
        combine([fixed("a", 1, 1), fixed("a", 1, 1)], [request()])


def test_totals_feed_the_advantages():
    from mlx_align.rollout.advantages import group_advantages

    rewards = parse_rewards(["gsm8k", "overlong:max=100,cache=20*0.5"])
    samples = [request("#### 18", answer="18"), request("#### 18", tokens=90, answer="18")]
    samples += [request("#### 17", answer="18"), request("?", answer="18")]
    total = combine(rewards, samples).total
    assert total.tolist() == [1, 0.75, 0, 0]
    expected = (total - total.mean()) / (total.std(ddof=1) + 1e-4)
    assert group_advantages(total.reshape(1, 4))[0] == pytest.approx(expected)


def test_columns_that_no_row_has_are_found_before_the_first_sample():
    def f(completion, solution):
        return 1

    rows = [{"prompt": "q", "answers": "18"}, {"prompt": "q", "solution": "", "level": None}]
    check_columns(parse_rewards([f, "length:9", "gsm8k:column=answers"]), rows)
    with pytest.raises(SettingsError) as caught:
        check_columns(parse_rewards([f, "gsm8k", "gsm8k:column=level"]), rows[:1])
    text = str(caught.value)
    assert "reward f reads the column 'solution', which no row has" in text
    assert (
        "reward gsm8k reads the column 'answer', which no row has (did you mean 'answers'?)" in text
    )
    assert "'level'" in text and text.endswith("The columns: answers, prompt")
