"""Models are put where LM Studio looks for them, and nowhere else."""

import json
import platform

import gguf
import pytest
import tiny

from mlx_align import api
from mlx_align.errors import ExportError, SettingsError
from mlx_align.export.lm_studio import default_format, models_folder


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home folder in which LM Studio has been started."""
    folder = tmp_path / "home"
    (folder / ".lmstudio").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(folder))
    return folder


@pytest.fixture
def adapter(model_folder, tmp_path):
    return tiny.make_adapter(tmp_path / "my-run", model_folder())


def test_a_gguf_model(home, adapter):
    out = api.export_model(adapter, "lmstudio", format="gguf", quantize="f16")
    assert out == home / ".lmstudio/models/mlx-align/my-run"
    assert {p.name for p in out.iterdir()} == {"my-run-F16.gguf", "README.md"}
    keys = gguf.GGUFReader(out / "my-run-F16.gguf").fields
    assert keys["general.architecture"].contents() == "llama"


def test_an_mlx_model(home, adapter):
    import mlx_lm

    out = api.export_model(adapter, "lmstudio", format="mlx", name="me/my-model")
    assert out == home / ".lmstudio/models/me/my-model"
    mlx_lm.load(str(out))


@pytest.mark.parametrize(
    ("system", "machine", "format"),
    [("Darwin", "arm64", "mlx"), ("Darwin", "x86_64", "gguf"), ("Linux", "aarch64", "gguf")],
)
def test_the_format_goes_by_the_machine(home, adapter, monkeypatch, system, machine, format):
    monkeypatch.setattr(platform, "system", lambda: system)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    assert default_format() == format
    out = api.export_model(adapter, "lmstudio")
    assert bool(list(out.glob("*.gguf"))) == (format == "gguf")


@pytest.mark.parametrize(("quantize", "format"), [("q4_1", "gguf"), ("4bit", "mlx")])
def test_the_format_goes_by_the_type(home, adapter, quantize, format):
    out = api.export_model(adapter, "lmstudio", quantize=quantize)
    assert bool(list(out.glob("*.gguf"))) == (format == "gguf")


def test_the_models_folder(home, tmp_path):
    studio = home / ".lmstudio"
    assert models_folder() == studio / "models"
    (studio / "settings.json").write_text(json.dumps({"downloadsFolder": str(tmp_path / "own")}))
    assert models_folder() == tmp_path / "own"
    (studio / "settings.json").write_text("[]")
    with pytest.raises(ExportError, match=r"settings\.json: not LM Studio's settings"):
        models_folder()
    older = home / ".cache" / "lm-studio"
    older.mkdir(parents=True)
    assert models_folder() == older / "models"
    noted = tmp_path / "noted"
    noted.mkdir()
    (home / ".lmstudio-home-pointer").write_text(f"{noted}\n")
    assert models_folder() == noted / "models"


def test_without_lm_studio_a_folder_must_be_named(home, adapter, tmp_path):
    (home / ".lmstudio").rmdir()
    with pytest.raises(ExportError, match="start LM Studio once, or name a folder with --output"):
        api.export_model(adapter, "lmstudio", format="gguf")
    out = api.export_model(
        adapter, "lmstudio", format="gguf", quantize="f32", output=tmp_path / "x"
    )
    assert {p.name for p in out.iterdir()} == {"x-F32.gguf", "README.md"}


@pytest.mark.parametrize(
    "name", ["..", "../x", "a/../b", "/x", "a/b/c", ".x", "a/", "", "a\\b", "a b", "a\n", "~"]
)
def test_names_that_would_lie_elsewhere(home, adapter, name):
    before = sorted(home.rglob("*"))
    with pytest.raises(SettingsError, match="is no name of a model, nor PUBLISHER/NAME"):
        api.export_model(adapter, "lmstudio", format="gguf", name=name or " ")
    assert sorted(home.rglob("*")) == before


def test_nothing_is_overwritten(home, adapter):
    out = api.export_model(adapter, "lmstudio", format="gguf", quantize="f32")
    before = (out / "my-run-F32.gguf").stat().st_mtime_ns
    with pytest.raises(ExportError, match="exists already; choose another --name"):
        api.export_model(adapter, "lmstudio", format="mlx")
    assert (out / "my-run-F32.gguf").stat().st_mtime_ns == before


def test_an_export_that_fails_leaves_no_folder(home, model_folder, tmp_path):
    adapter = tiny.make_adapter(tmp_path / "run", model_folder("granite"))
    with pytest.raises(ExportError, match="cannot be written as GGUF"):
        api.export_model(adapter, "lmstudio", format="gguf")
    assert not list(home.rglob("*run*"))


def test_options_that_make_no_sense(adapter):
    with pytest.raises(SettingsError, match="LM Studio puts no adapters on"):
        api.export_model(adapter, "lmstudio", adapter_only=True)
    with pytest.raises(SettingsError, match="what LM Studio is given, mlx or gguf"):
        api.export_model(adapter, "hf", format="mlx")
    with pytest.raises(SettingsError, match="what LM Studio is given, mlx or gguf"):
        api.export_model(adapter, "lmstudio", format="onnx")
