"""Model cards say what an export is, and the Hub is given what was exported."""

import inspect
import json
import shutil

import huggingface_hub
import pytest
import tiny
import yaml
from huggingface_hub.errors import LocalTokenNotFoundError

from mlx_align import api
from mlx_align.errors import ExportError, SettingsError
from mlx_align.export.card import FORMS, is_hub_id, make_card
from mlx_align.files import write_json
from mlx_align.model.load import load_model

CHANGE = {
    "what": "refuses harmful requests", "before": 0.25, "after": 0.75, "count": 40, "better": "higher",
    "key": "refuses/harmful", "source": "requests", "unit": "share", "low": 0.3, "high": 0.7,
    "before_interval": [0.1, 0.4], "after_interval": [0.6, 0.9], "change": 0.5, "smallest_change": 0.2,
}  # fmt: skip


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A run of one step on the demo."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    return api.train_model("dpo", steps=1, batch_size=2, lora_rank=3, output=folder).folder


@pytest.fixture
def run_folder(trained, tmp_path):
    folder = tmp_path / "my-run"
    shutil.copytree(trained, folder)
    return folder


def front_matter(card):
    _, values, text = card.split("---\n", 2)
    return yaml.safe_load(values), text


def rows_of(text):
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    return {row[0]: row[1:] for row in rows}


def test_the_card_of_a_run(run_folder):
    write_json(
        run_folder / "comparison.json",
        {"verdict": {"text": "aligned: yes"}, "changes": [CHANGE, {**CHANGE, "key": "refuses/type/x"}]},
    )  # fmt: skip
    record = json.loads((run_folder / "run.json").read_text())
    record["settings"] |= {
        "data": "/Users/me/secret/prefs.jsonl",
        "lora_keys": [
            "~/secret/a",
            "../secret/b:0.5",
            "judge:/Users/me/c d/e",
            "x:org/model",
            "a.b_c",
        ],
        "lora_dropout": "two\nlines | more",
    }
    write_json(run_folder / "run.json", record)
    values, text = front_matter((api.export_model(run_folder, "hf") / "README.md").read_text())
    assert values == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["mlx-align", "dpo"],
    }
    rows = rows_of(text)
    assert "A model made from demo, trained by `dpo`." in text
    assert rows["Formula"] == ["Rafailov et al. 2023, arXiv:2305.18290, equation 7"]
    assert rows["Data"] == ["prefs.jsonl"] and "/Users" not in text and "secret" not in text
    assert rows["`lora_keys`"] == ["a, b:0.5, judge:e, x:org/model, a.b_c"]
    assert "| `lora_dropout` | two lines \\| more |\n" in text
    examples = f"{record['train_examples']:,}, and {record['valid_examples']:,} held out"
    assert rows["Examples"] == [examples]
    assert rows["`lora_rank`"] == ["3"] and rows["`steps`"] == ["1"]
    assert "`output`" not in rows and "`beta`" not in rows
    for key, value in record["after"].items():
        assert rows[f"`{key}`"] == [f"{record['before'][key]:.4g}", f"{value:.4g}"]
    assert "aligned: yes" in text
    compared = ["25%", "75%", "+50 pt", "+30 pt to +70 pt"]
    assert rows["refuses harmful requests (of 40)"] == compared
    assert text.count("refuses harmful requests") == 1
    assert "Made with mlx-align " in text


def test_what_the_base_says_of_its_licence(model_folder, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(model_folder(), base)
    (base / "README.md").write_text(
        "---\nlicense: other\nlicense_name: tiny-1\nlicense_link: LICENSE\ntags: [x]\n---\n# Base\n"
    )
    adapter = tiny.make_adapter(tmp_path / "run", base)
    values, text = front_matter((api.export_model(adapter, "mlx") / "README.md").read_text())
    assert values["license_name"] == "tiny-1" and values["license"] == "other"
    assert "The base's licence holds: tiny-1." in text and "How it was made" not in text


@pytest.mark.parametrize(
    "card", ["", "# No front matter\n", "---\n- a list\n---\n", "---\na: [\n---\n"]
)
def test_bases_without_a_licence(model_folder, tmp_path, card):
    base = tmp_path / "base"
    shutil.copytree(model_folder(), base)
    (base / "README.md").write_text(card)
    loaded = load_model(str(base))
    values, text = front_matter(make_card(loaded, base, "hf", tmp_path / "out", name="x"))
    assert "license" not in values and "its own card names none" in text


@pytest.mark.parametrize("form", FORMS)
def test_how_to_use_it(model_folder, tmp_path, form):
    loaded = load_model(str(model_folder()))
    card = make_card(
        loaded, "x", form, tmp_path / "out" / "m.gguf", name="mine", repo="me/mine", base_name="org/base"
    )  # fmt: skip
    values, text = front_matter(card)
    assert values["base_model"] == "org/base"
    assert values["base_model_relation"] == ("adapter" if FORMS[form].adapter else "finetune")
    snippet = text.partition("```")[2].partition("```")[0]
    assert any(name in snippet for name in ("me/mine", "m.gguf", "ollama create mine"))
    language, code = snippet.split("\n", 1)
    if language == "python":
        compile(code, form, "exec")


@pytest.mark.parametrize(
    ("to", "options", "form"),
    [
        ("mlx", {"adapter_only": True}, "mlx-adapter"),
        ("hf", {"adapter_only": True}, "peft"),
        ("peft", {}, "peft"),
        ("ollama", {}, "ollama"),
        ("ollama", {"adapter_only": True, "base_name": "llama3.2:1b"}, "ollama-adapter"),
        ("hf", {}, "hf"),
    ],
)
def test_every_folder_has_a_card(model_folder, tmp_path, monkeypatch, to, options, form):
    monkeypatch.setenv("PATH", str(tmp_path))
    adapter = tiny.make_adapter(tmp_path / "run", model_folder())
    card = (api.export_model(adapter, to, **options) / "README.md").read_text()
    last = FORMS[form].snippet.splitlines()[-1].partition("{")[0]
    assert f"library_name: {FORMS[form].library}\n" in card and last in card


def test_a_reward_model(model_folder, tmp_path):
    adapter = tiny.make_adapter(tmp_path / "run", model_folder(), reward=True)
    values, text = front_matter((api.export_model(adapter, "hf") / "README.md").read_text())
    assert values["pipeline_tag"] == "text-classification"
    assert "AutoModelForSequenceClassification" in text
    text = (api.export_model(adapter, "peft") / "README.md").read_text()
    assert "AutoModelForSequenceClassification" in text and "PeftModel" in text


def test_a_comparison_that_cannot_be_read_is_left_out(run_folder, caplog):
    (run_folder / "comparison.json").write_text('{"changes": [{}]}')
    text = (api.export_model(run_folder, "mlx") / "README.md").read_text()
    assert "compares with its base" not in text and "comparison.json: cannot be read" in caplog.text


def test_names_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own" / "model").mkdir(parents=True)
    assert is_hub_id("owner/model-1.5")
    assert not any(map(is_hub_id, ("demo", "own/model", "/a/b", "a/b/c", "~/a", "llama3.2:1b")))


# -- the Hub -----------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch):
    """What the Hub was asked for, in order: [(method, arguments by name)], as its library takes them."""
    calls = []
    real = huggingface_hub.HfApi

    class Hub:
        def whoami(self):
            calls.append(("whoami", {}))

        def create_repo(self, *args, **options):
            given = self._note(real.create_repo, *args, **options)
            return f"https://huggingface.co/{given['repo_id']}"

        def upload_folder(self, **options):
            given = self._note(real.upload_folder, **options)
            given["files"] = {p.name for p in given["folder_path"].iterdir()}

        def upload_file(self, **options):
            self._note(real.upload_file, **options)

        def _note(self, method, *args, **options):
            given = dict(inspect.signature(method).bind(self, *args, **options).arguments)
            del given["self"]
            calls.append((method.__name__, given))
            return given

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    return calls


def test_a_folder_is_pushed(run_folder, hub, caplog):
    with caplog.at_level("INFO", logger="mlx_align"):
        out = api.export_model(run_folder, "hf", push="me/mine")
    names = [name for name, _ in hub]
    assert names == ["whoami", "create_repo", "upload_folder"]
    assert hub[1][1] == {"repo_id": "me/mine", "exist_ok": True}
    upload = hub[2][1]
    assert upload["repo_id"] == "me/mine" and upload["folder_path"] == out
    assert {"README.md", "model.safetensors", "config.json", "tokenizer.json"} <= upload["files"]
    assert "https://huggingface.co/me/mine" in caplog.text
    card = (out / "README.md").read_text()
    assert '"me/mine"' in card and "# mine\n" in card
    # Nothing in it says where things lie here.
    for file in out.glob("*"):
        assert str(run_folder.parent).encode() not in file.read_bytes(), file


def test_a_file_is_pushed_with_its_card(run_folder, hub):
    out = api.export_model(run_folder, "gguf", push="me/mine")
    (_, file), (_, card) = hub[2:]
    assert file["path_or_fileobj"] == out and file["path_in_repo"] == "my-run-f16.gguf"
    assert card["path_in_repo"] == "README.md"
    assert "llama-cli -m my-run-f16.gguf" in card["path_or_fileobj"].decode()


@pytest.mark.parametrize("to", ["peft", "mlx"])
def test_an_adapter_needs_a_base_that_others_have(model_folder, tmp_path, hub, to):
    adapter = tiny.make_adapter(tmp_path / "run", model_folder())
    with pytest.raises(SettingsError, match="is not on the Hub; give its id as base_name"):
        api.export_model(adapter, to, adapter_only=True, push="me/mine")
    assert not (adapter / "export").exists()
    out = api.export_model(adapter, to, adapter_only=True, push="me/mine", base_name="org/base")
    assert hub[-1][0] == "upload_folder"
    assert '"org/base"' in (out / "adapter_config.json").read_text()
    assert str(tmp_path) not in (out / "adapter_config.json").read_text()


@pytest.mark.parametrize(
    "error", [LocalTokenNotFoundError("Token is required"), OSError("401 Unauthorized")]
)
def test_without_a_token_no_work_is_done(run_folder, monkeypatch, error):
    class Hub:
        def whoami(self):
            raise error

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    with pytest.raises(ExportError, match="log in with hf auth login, or set HF_TOKEN"):
        api.export_model(run_folder, "hf", push="me/mine")
    assert not (run_folder / "export").exists()


def test_the_real_hub_library_without_a_token(run_folder, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(ExportError, match="the Hub does not know you"):
        api.export_model(run_folder, "hf", push="me/mine")


@pytest.mark.parametrize("name", ["mine", "a/b/c", "me/../x", "me/mine--", " "])
def test_what_is_no_repository(run_folder, hub, name):
    with pytest.raises(SettingsError, match="push: "):
        api.export_model(run_folder, "hf", push=name)
    assert hub == []


@pytest.mark.parametrize("error", [OSError, RuntimeError, ValueError])
def test_an_upload_that_fails_keeps_the_export(run_folder, hub, monkeypatch, error):
    def fail(self, **_):
        raise error("502 Bad Gateway\nmore")

    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", fail)
    with pytest.raises(ExportError) as caught:
        api.export_model(run_folder, "hf", push="me/mine")
    out = run_folder / "export" / "hf"
    assert "502 Bad Gateway. " in str(caught.value)
    assert f"is kept; go on with: hf upload me/mine {out}" in str(caught.value)
    assert (out / "model.safetensors").exists()


@pytest.mark.parametrize("to", ["ollama", "lmstudio"])
def test_what_is_not_pushed(run_folder, hub, to):
    with pytest.raises(SettingsError, match="push: goes with hf, mlx, gguf and peft"):
        api.export_model(run_folder, to, push="me/mine")
