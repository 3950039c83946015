"""What a user can name: files, folders, and the stores of Ollama and LM Studio."""

import hashlib
import json
import logging
import shutil

import mlx.core as mx
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from make_gguf import write_gguf

from mlx_align import api, cli
from mlx_align.errors import AlignError, ExportError, ModelError
from mlx_align.importer.source import find_source, plain_name
from mlx_align.model.load import STORED, load_model, load_tokenizer


@pytest.fixture
def gguf_file(model_folder, tmp_path):
    loaded = load_model(str(model_folder("llama")), STORED)
    return write_gguf(loaded, tmp_path / "Tiny-Q8_0.gguf", Kind.Q8_0)


def ollama_store(root, file, name="registry.ollama.ai/library/tiny/1b", **layers):
    """A store with one model; `layers` are texts by kind."""
    (root / "blobs").mkdir(parents=True)
    contents = {"model": file.read_bytes(), **{k: v.encode() for k, v in layers.items()}}
    manifest = []
    for kind, content in contents.items():
        digest = hashlib.sha256(content).hexdigest()
        (root / "blobs" / f"sha256-{digest}").write_bytes(content)
        media = f"application/vnd.ollama.image.{kind}"
        manifest.append({"mediaType": media, "digest": f"sha256:{digest}", "size": len(content)})
    path = root / "manifests" / name
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"schemaVersion": 2, "layers": manifest}))
    return path


def test_a_model_of_ollamas(gguf_file, tmp_path, monkeypatch, caplog):
    params = {"stop": ["<|end_of_text|>", "no token"], "temperature": 0.3, "num_ctx": 4096}
    ollama_store(
        tmp_path / "store", gguf_file, params=json.dumps(params), system="Be kind.",
        license="Do good.", template="{{ .Prompt }}",
    )  # fmt: skip
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "store"))
    monkeypatch.chdir(tmp_path)
    out = api.import_model("ollama:tiny:1b")
    assert str(out) == "models/tiny-1b"
    generation = json.loads((out / "generation_config.json").read_text())
    tokenizer = load_tokenizer(out).tokenizer
    end = tokenizer.convert_tokens_to_ids("<|end_of_text|>")
    assert generation["temperature"] == 0.3 and end in generation["eos_token_id"]
    assert "num_ctx" not in generation
    assert (out / "LICENSE").read_text() == "Do good."
    assert "Be kind." in caplog.text and "no chat template" not in caplog.text


def test_an_old_file_of_ollamas_has_no_jinja_template(model_folder, tmp_path, monkeypatch, caplog):
    loaded = load_model(str(model_folder("llama", template=None)), STORED)
    file = write_gguf(loaded, tmp_path / "m.gguf")
    name = "hf.co/someone/Some-GGUF/Q8_0"
    ollama_store(tmp_path / "store", file, name, template="[INST]{{ .Prompt }}")
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "store"))
    out = api.import_model("ollama:hf.co/someone/Some-GGUF:Q8_0", output=tmp_path / "out")
    assert "--chat-template chatml" in caplog.text and "blobs/sha256-" in caplog.text
    assert load_tokenizer(out).template is None


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("tiny", "registry.ollama.ai/library/tiny/latest"),
        ("someone/tiny:1b", "registry.ollama.ai/someone/tiny/1b"),
        ("hf.co/someone/Some-GGUF", "hf.co/someone/Some-GGUF/latest"),
        ("localhost:5000/someone/tiny", "localhost:5000/someone/tiny/latest"),
        ("localhost:5000/someone/tiny:1b", "localhost:5000/someone/tiny/1b"),
    ],
)
def test_names_of_ollamas(gguf_file, tmp_path, monkeypatch, name, place):
    ollama_store(tmp_path / "store", gguf_file, place)
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "store"))
    found = find_source(f"ollama:{name}")
    assert found.path.read_bytes() == gguf_file.read_bytes()
    assert "/" not in found.name and ":" not in found.name


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("ollama:tiny:7b", "ollama pull tiny:7b"),
        ("ollama:../../etc:x", "not a name"),
        ("ollama:tiny:../1b", "not a name"),
        ("ollama:/tiny", "not a name"),
        ("ollama:tiny:1b:2b", "not a name"),
        ("ollama:a:..:b/c/d", "not a name"),
        ("ollama:", "not a name"),
        ("lmstudio:../x/y", "not a name"),
        ("lmstudio:a/b", "LM Studio's folder ~/.lmstudio is not here"),
        ("nowhere/at/all", "no such model folder"),
    ],
)
def test_names_that_lead_nowhere(gguf_file, tmp_path, monkeypatch, name, words):
    ollama_store(tmp_path / "store", gguf_file)
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "store"))
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ModelError, match=words):
        find_source(name)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m["layers"][0].update(digest="sha256:../../../secret"), "without a digest"),
        (lambda m: m["layers"][0].update(size=3), "not there as a whole"),
        (
            lambda m: m["layers"][0].update(mediaType="application/vnd.ollama.image.tensor"),
            "no GGUF",
        ),
        (lambda m: m["layers"].append(m["layers"][0]), "consists of 2 files"),
        (lambda m: m.update(layers="x"), "no GGUF"),
        (lambda m: m.update(layers=[3]), "without a digest"),
        (
            lambda m: m["layers"].append({**m["layers"][0], "mediaType": f"{MEDIA}adapter"}),
            "adapter",
        ),
    ],
)
def test_bad_manifests(gguf_file, tmp_path, monkeypatch, change, words):
    path = ollama_store(tmp_path / "store", gguf_file)
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "store"))
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(ModelError, match=words):
        find_source("ollama:tiny:1b")


MEDIA = "application/vnd.ollama.image."


def test_models_of_lm_studio(gguf_file, model_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / ".lmstudio" / "models" / "someone" / "Tiny-GGUF"
    folder.mkdir(parents=True)
    shutil.copy(gguf_file, folder)
    (folder / "mmproj-Tiny.gguf").write_bytes(b"GGUF")
    found = find_source("lmstudio:someone/Tiny-GGUF")
    assert (found.kind, found.path.name, found.name) == ("gguf", "Tiny-Q8_0.gguf", "Tiny-Q8_0")
    shutil.copy(gguf_file, folder / "Tiny-Q4_0.gguf")
    with pytest.raises(ModelError, match=r"several GGUF files.*Tiny-Q4_0.gguf, Tiny-Q8_0.gguf"):
        find_source("lmstudio:someone/Tiny-GGUF")
    assert find_source("lmstudio:someone/Tiny-GGUF/Tiny-Q4_0.gguf").name == "Tiny-Q4_0"
    # Another folder for models, and one with a model for MLX.
    (tmp_path / ".lmstudio" / "settings.json").write_text(
        json.dumps({"downloadsFolder": str(tmp_path / "elsewhere")})
    )
    shutil.copytree(model_folder("llama"), tmp_path / "elsewhere" / "mlx" / "tiny")
    assert find_source("lmstudio:mlx/tiny").kind == "folder"


def test_folders_of_safetensors_are_linked_with_both_spellings(model_folder, tmp_path):
    folder = tmp_path / "hf"
    shutil.copytree(model_folder("llama"), folder)
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] = {"rope_theta": 5000.0, "rope_type": "default"}
    del config["rope_theta"]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_evil.py").write_text("raise SystemExit")
    out = api.import_model(folder, output=tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["rope_theta"] == 5000.0
    assert (out / "model.safetensors").samefile(folder / "model.safetensors")
    assert not list(out.glob("*.py"))
    loaded = load_model(str(out))
    assert loaded.template is not None
    half = load_model(
        str(api.import_model(folder, output=tmp_path / "half", dtype="float16")), STORED
    )
    assert half.dtype == mx.float16


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "can run code"),
        (lambda f: (f / "model.safetensors").unlink(), "has no weights"),
        (
            lambda f: (f / "model.safetensors.index.json").write_text(
                '{"weight_map": {"x": "../../secret.safetensors"}}'
            ),
            "names '../../secret.safetensors', which is no weight file beside it",
        ),
        (
            lambda f: (f / "model.safetensors.index.json").write_text(
                '{"weight_map": {"x": "/etc"}}'
            ),
            "no weight file beside it",
        ),
        (lambda f: (f / "model.safetensors.index.json").write_text("[" * 10**5), "not valid JSON"),
        (lambda f: (f / "config.json").write_text('{"model_type": "nothing"}'), "cannot be loaded"),
        (lambda f: (f / "config.json").write_text("[1]"), "not a JSON object"),
    ],
)
def test_folders_that_cannot_be_imported(model_folder, tmp_path, change, words):
    folder = tmp_path / "hf"
    shutil.copytree(model_folder("llama"), folder)
    change(folder)
    with pytest.raises(ModelError, match=words):
        api.import_model(folder, output=tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_kinds_of_folders(tmp_path):
    with pytest.raises(ModelError, match="neither a model folder"):
        find_source(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    assert find_source(tmp_path).kind == "peft"
    (tmp_path / "adapter_config.json").write_text('{"fine_tune_type": "lora"}')
    with pytest.raises(ModelError, match="mlx-align export takes it"):
        find_source(tmp_path)


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "/abs", "..", ".", "", "a/b\\c", "x\0y", "ünï Code", ".hidden"]
)
def test_names_stay_names(tmp_path, name):
    plain = plain_name(name)
    assert (tmp_path / plain).resolve().parent == tmp_path.resolve() and not plain.startswith(".")


def test_what_stands_there_is_not_replaced(gguf_file, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(AlignError, match="exists already"):
        api.import_model(gguf_file, output=tmp_path / "out")
    assert (tmp_path / "out" / "mine").exists()


def test_an_import_that_fails_leaves_nothing(gguf_file, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(mx, "save_safetensors", full)
    with pytest.raises(ExportError, match="No space left"):
        api.import_model(gguf_file, output=tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == [gguf_file.name]


def run(*arguments):
    with pytest.raises(SystemExit) as ended:
        cli.main([*map(str, arguments)])
    return ended.value.code


def test_import_then_train(gguf_file, tmp_path, capsys, monkeypatch):
    """What comes out of `import` is what `dpo` takes."""
    monkeypatch.setattr(logging.getLogger("mlx_align"), "propagate", True)
    assert run("import", gguf_file, "--output", tmp_path / "m") == 0
    shown = capsys.readouterr().out
    assert "Q8_0: 15 tensors packed in 8 bits, exactly" in shown
    assert f"mlx-align dpo --model {tmp_path / 'm'}" in shown
    rows = [{"prompt": f"say {i}", "chosen": "yes", "rejected": "no"} for i in range(4)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert run(
        "dpo", "--model", tmp_path / "m", "--data", tmp_path / "pairs.jsonl", "--steps", 1,
        "--output", tmp_path / "run",
    ) == 0  # fmt: skip


@pytest.mark.parametrize("to", ["gguf", "hf", "mlx"])
def test_convert(model_folder, gguf_file, tmp_path, to):
    out = tmp_path / "made"
    form = ("--quantize", "f32") if to == "gguf" else ("--dtype", "float32")
    assert run("convert", gguf_file, "--to", to, "--output", out, *form) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == [gguf_file.name, "made"]
    again = load_model(str(api.import_model(out, output=tmp_path / "again")))
    direct = load_model(str(api.import_model(gguf_file, output=tmp_path / "direct")))
    tokens = mx.array([list(range(40))])
    assert np.allclose(again.model(tokens), direct.model(tokens), atol=1e-4)
