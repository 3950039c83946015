"""Exports on the Hugging Face Hub."""

import logging
from pathlib import Path

from mlx_align.errors import ExportError, SettingsError
from mlx_align.export.card import CARD

log = logging.getLogger("mlx_align")


def check_access(repo: str) -> None:
    """Raise `SettingsError` for what is no repository's name, `ExportError` where nobody is logged in."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, HTTPError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise SettingsError(f"push: {error}") from None
    if "/" not in repo:
        raise SettingsError(f"push: {repo!r} is no repository on the Hub, such as USER/REPO")
    try:
        HfApi().whoami()
    except (OSError, HTTPError) as error:
        raise ExportError(
            f"push: the Hub does not know you ({_first_line(error)}); log in with hf auth login, or set "
            "HF_TOKEN to a token that may write"
        ) from None


def upload(path: Path, repo: str, card: str) -> None:
    """Upload an exported folder, or a file with its card. A repository that is new is public."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError

    hub = HfApi()
    try:
        url = hub.create_repo(repo, exist_ok=True)
        if path.is_dir():
            hub.upload_folder(repo_id=repo, folder_path=path)
        else:
            hub.upload_file(repo_id=repo, path_or_fileobj=path, path_in_repo=path.name)
            hub.upload_file(repo_id=repo, path_or_fileobj=card.encode(), path_in_repo=CARD)
    except (OSError, HTTPError, RuntimeError, ValueError) as error:
        # RuntimeError is how its library says that one file failed, ValueError that it refuses the card.
        raise ExportError(
            f"push: {repo}: {_first_line(error)}. {path} is kept; go on with: hf upload {repo} {path}"
        ) from None
    log.info("pushed: %s", url)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
