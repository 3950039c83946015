"""Fixtures that many tests share. Nothing of the user's own is touched: no cache, no running Ollama."""

from pathlib import Path

import pytest
import tiny

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setenv("MLX_ALIGN_CACHE", str(tmp_path_factory.mktemp("cache")))
    patch.setenv("HF_HUB_OFFLINE", "1")
    patch.setenv("OLLAMA_HOST", "127.0.0.1:1")
    yield
    patch.undo()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """make(family, **changes) -> folder of a tiny model, made once."""
    made = {}

    def make(family="llama", **changes):
        key = (family, str(sorted(changes.items(), key=str)))
        if key not in made:
            made[key] = tiny.make_model(tmp_path_factory.mktemp(family), family, **changes)
        return made[key]

    return make


@pytest.fixture
def loaded_model(model_folder):
    """make(family, **changes) -> a freshly loaded tiny model with its layout chosen."""
    from mlx_align.model.forward import choose_layout
    from mlx_align.model.load import load_model

    def make(family="llama", **changes):
        loaded = load_model(str(model_folder(family, **changes)))
        choose_layout(loaded)
        return loaded

    return make


@pytest.fixture(scope="session")
def shared():
    """shared(path) -> a file of the collection beside the checkout; skips where there is none."""

    def find(path):
        file = SHARED / path
        if not file.exists():
            pytest.skip(
                f"needs {path} from the shared collection, which is not beside this checkout"
            )
        return file

    return find
