"""The command line: every setting by every way, clear errors, and the commands as a user types them."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from mlx_align import api
from mlx_align.cli import main
from mlx_align.losses import METHODS
from mlx_align.settings import value_type
from mlx_align.train.config import GROUPS, setting_names
from mlx_align.train.loop import Result

PACKAGE = Path(__file__).resolve().parents[2] / "mlx_align"
ALL = [(method, name) for method in METHODS for name in setting_names(method)]


def run(*arguments):
    """(exit status) of a command in this process."""
    try:
        main([str(a) for a in arguments])
    except SystemExit as end:
        return end.code
    raise AssertionError("main must exit")


@pytest.fixture
def captured(monkeypatch):
    """The settings that a training command ends with, instead of a training."""
    seen = []

    def fake(settings, folder, **_):
        seen.append(settings)
        return Result(folder, 1, True, {}, {}, None, ("loss", False), "")

    monkeypatch.setattr(api, "train", fake)
    # What it takes to go on from an adapter is no setting's business.
    monkeypatch.setattr(api, "_resolve_start", lambda values: values)
    return seen


def another_value(field):
    """A valid value that is not the default."""
    kind, _, many = value_type(field)
    meta = field.metadata
    if meta["choices"]:
        return next(c for c in meta["choices"] if c != field.default)
    if kind is bool:
        return not field.default
    if field.name == "losses":
        return ["hinge=1", "ipo=2"]
    if kind is str:
        return ["one", "two"] if many else "something"
    low = meta["minimum"] if meta["minimum"] is not None else meta["above"]
    value = kind((low or 0) + (1 if kind is int else 0.125))
    return value + 1 if value == field.default else value


@pytest.mark.parametrize(("method", "name"), ALL)
def test_every_setting_by_flag_by_file_and_from_python(captured, tmp_path, method, name, capsys):
    field = setting_names(method)[name]
    value = another_value(field)
    flag = "--" + name.replace("_", "-")
    if value_type(field)[0] is bool:
        flags = [flag if value else flag.replace("--", "--no-", 1)]
    else:
        flags = [flag, ",".join(value) if isinstance(value, list) else value]
    file = tmp_path / "settings.yaml"
    file.write_text(yaml.safe_dump({name: value}))
    assert run(method, *flags) == 0
    assert run(method, "-c", file) == 0
    api.train_model(method, **{name: value})
    expected = tuple(value) if isinstance(value, list) else value
    for settings in captured:
        assert settings.flat()[name] == (
            list(expected) if isinstance(expected, tuple) else expected
        )
    assert len({json.dumps(s.flat(), sort_keys=True) for s in captured}) == 1
    for alias in field.metadata["aliases"]:
        captured.clear()
        file.write_text(yaml.safe_dump({alias: value}))
        assert run(method, "-c", file) == 0
        assert run(method, "--" + alias.replace("_", "-"), *flags[1:]) == 0
        assert all(s.flat()[name] == value for s in captured) and len(captured) == 2


@pytest.mark.parametrize("name", sorted({name for _, name in ALL}))
def test_every_setting_is_used_somewhere(name):
    files = [f for f in PACKAGE.rglob("*.py") if f.name not in ("config.py", "options.py")]
    assert any(re.search(rf"\.{name}\b", f.read_text()) for f in files)


def test_names_are_unique_across_groups():
    for method in METHODS.values():
        names = [f.name for cls in (method, *GROUPS) for f in dataclasses.fields(cls)]
        names += [
            a
            for cls in (method, *GROUPS)
            for f in dataclasses.fields(cls)
            for a in f.metadata["aliases"]
        ]
        assert len(names) == len(set(names))


def test_flag_beats_file_beats_default(captured, tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("beta: 0.3\nbatch-size: 5\niters: 7\n")
    assert run("dpo", "-c", file, "--beta", "0.7", "--data", "x.jsonl", "--model", "m") == 0
    settings = captured[0]
    assert settings.method.beta == 0.7
    assert settings.train.batch_size == 5 and settings.train.steps == 7
    assert settings.adapter.lora_rank == 8


def test_the_demo_brings_its_own_learning_rate_below_files_and_flags(captured):
    run("dpo")
    run("dpo", "--learning-rate", "1e-5")
    run("dpo", "--model", "other")
    rates = [s.learning_rate for s in captured]
    assert rates[0] > 1e-4 and rates[1:] == [1e-5, 1e-5]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("betta: 1", "unknown setting 'betta' (did you mean 'beta'?)"),
        ("beta: -1", "beta: -1.0 is out of range"),
        ("beta: [", "not valid YAML"),
    ],
)
def test_mistakes_in_files_are_one_line(tmp_path, capsys, text, words):
    file = tmp_path / "a.yaml"
    file.write_text(text)
    assert run("dpo", "-c", file) == 1
    captured = capsys.readouterr()
    assert words in captured.err and captured.err.startswith("error: ")
    assert "Traceback" not in captured.err and str(file) in captured.err


def test_mistakes_in_flags(tmp_path, capsys):
    assert run("dpo", "--beta", "-1") == 1
    assert "beta: -1.0 is out of range; it must be greater than 0" in capsys.readouterr().err
    assert run("dpo", "--bata", "1") == 2
    assert "--beta" in capsys.readouterr().err
    assert run("dpoo") == 2
    assert run("dpo", "--schedule", "quadratic") == 2
    assert run("dpo", "--data", tmp_path / "none.jsonl", "--output", tmp_path / "r") == 1
    assert "no such file" in capsys.readouterr().err
    assert run("dpo", "--resume", tmp_path, "--beta", "0.2") == 1
    assert "leave out --beta" in capsys.readouterr().err


def test_debug_shows_the_traceback():
    from mlx_align.errors import SettingsError

    with pytest.raises(SettingsError):
        main(["dpo", "--beta", "-1", "--debug"])


def test_each_method_shows_only_its_own_flags(capsys):
    assert run("sft", "--help") == 0
    text = capsys.readouterr().out
    assert "--beta" not in text and "--batch-size" in text and "--steps, --iters" in text
    assert run("dpo", "--help") == 0
    text = capsys.readouterr().out
    assert "--beta" in text and "arXiv:2305.18290" in text
    for heading in ("Run:", "Method:", "Model:", "Data:", "Adapter:", "Training:"):
        assert heading in text


def test_a_run_of_another_method_is_not_repeated(tmp_path, capsys):
    file = tmp_path / "run.json"
    file.write_text(json.dumps({"method": "sft", "settings": {"steps": 3}}))
    assert run("dpo", "-c", file) == 1
    assert "is a run of sft, not of dpo" in capsys.readouterr().err


@pytest.fixture(scope="module")
def demo_run(tmp_path_factory):
    """A short run on the embedded demo, by the command line."""
    folder = tmp_path_factory.mktemp("demo") / "run"
    command = [sys.executable, "-m", "mlx_align", "dpo", "--steps", "4", "--eval-every", "2"]
    done = subprocess.run(
        [*command, "--output", folder], capture_output=True, text=True, check=True
    )
    return folder, done.stdout


def test_what_a_training_shows(demo_run):
    folder, output = demo_run
    for words in (
        "340 training and 60 held-out examples",
        "held out at step 0",
        "held-out data",
        f"run folder: {folder}",
        "step 4/4",
        "tok/s",
    ):
        assert words in output, words


def test_generate(demo_run, tmp_path, capsys):
    folder, _ = demo_run
    assert run("generate", folder, "--prompt", "What is the capital of France?") == 0
    assert "Paris" in capsys.readouterr().out
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("What is the capital of Italy?\nWhat colour is snow?\n")
    assert run("generate", folder, "--prompts", prompts, "--max-tokens", "20") == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert "Rome" in rows[0]["completion"] and "white" in rows[1]["completion"]
    assert run("generate", folder) == 1
    assert "give one of --prompt and --prompts" in capsys.readouterr().err


def test_compare(demo_run, tmp_path, capsys):
    folder, _ = demo_run
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "What is the capital of Japan?"}\n')
    assert run("compare", folder, "--prompts", prompts) == 0
    output = capsys.readouterr().out
    assert "> What is the capital of Japan?" in output and output.count("Tokyo") == 2
    assert run("compare", folder) == 0
    output = capsys.readouterr().out
    for words in (
        "refuses harmful requests (of 24)",
        "answers questions right (of 60)",
        "base",
        "aligned",
    ):
        assert words in output
    assert run("compare", "demo") == 1
    assert "has no adapter" in capsys.readouterr().err


def test_chat(demo_run):
    folder, _ = demo_run
    command = [sys.executable, "-m", "mlx_align", "chat", folder]
    talk = "What is the capital of France?\n/reset\n\nWhat colour is snow?\n/quit\nnever said\n"
    done = subprocess.run(command, input=talk, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "The capital of France is Paris.",
        "The colour of snow is white.",
    ]


def test_export_says_where(demo_run, capsys):
    folder, _ = demo_run
    assert run("export", folder, "--to", "hf") == 0
    assert capsys.readouterr().out.strip() == f"written: {folder}/export/hf"
    assert run("export", folder, "--to", "gguf", "--quantize", "q8_0") == 0
    assert (folder / "export" / "run-q8_0.gguf").exists()
    assert run("export", folder, "--to", "gguf", "--adapter-only") == 0
    assert (folder / "export" / "run-adapter.gguf").exists()
    assert run("export", folder, "--to", "peft", "--base-name", "owner/base") == 0
    assert '"owner/base"' in (folder / "export" / "peft" / "adapter_config.json").read_text()
    assert run("export", "demo", "--to", "gguf") == 1
    assert "--output is needed" in capsys.readouterr().err
    assert run("export", folder, "--to", "mlx", "--output", folder) == 1
    assert "exists already" in capsys.readouterr().err


def test_export_by_importance(demo_run, tmp_path, capsys):
    folder, _ = demo_run
    text = tmp_path / "text.txt"
    text.write_text("What is the capital of France? The capital of France is Paris.\n" * 60)
    export = ("export", folder, "--to", "gguf", "--quantize")
    assert run(*export, "q4_k_m", "--calibrate", text) == 0
    assert (folder / "export" / "run-q4_k_m.gguf").exists()
    for options, words in (
        (("q4_k_m", "--imatrix", text), "is not an importance matrix"),
        (("q8_0", "--calibrate", text), "calibrate: only matters to GGUF of other types than f32"),
        (("q4_0", "--calibrate", text, "--imatrix", text), "one importance matrix, not two"),
    ):
        assert run(*export, *options) == 1
        assert words in capsys.readouterr().err


def test_export_offers_the_types_there_are():
    from mlx_align.cli.export import GGUF_TYPES, MLX_TYPES
    from mlx_align.export.mlx_quants import BITS
    from mlx_align.export.recipe import FILE_TYPES

    assert sorted(GGUF_TYPES) == sorted(FILE_TYPES)
    assert sorted(MLX_TYPES) == sorted(BITS)


def test_things_that_are_no_model(tmp_path, capsys):
    assert run("chat", tmp_path) == 1
    assert "not a model folder" in capsys.readouterr().err
    assert run("generate", tmp_path / "nothing", "--prompt", "x") == 1
    assert "no such model folder" in capsys.readouterr().err


def test_help_answers_at_once():
    import resource

    def seconds():
        # Of the processor: a busy machine takes longer by the clock.
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    best = 9.0
    for _ in range(3):
        started = seconds()
        subprocess.run(
            [sys.executable, "-m", "mlx_align", "--help"], check=True, capture_output=True
        )
        best = min(best, seconds() - started)
    assert best < 0.8
