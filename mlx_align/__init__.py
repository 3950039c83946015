"""Align language models to preferences on a Mac: from a jsonl file to a model in Ollama."""

import importlib

_PUBLIC = {
    "train_model": "mlx_align.api",
    "check_data": "mlx_align.api",
    "generate": "mlx_align.api",
    "evaluate_model": "mlx_align.api",
    "sweep": "mlx_align.api",
    "iterate": "mlx_align.api",
    "score": "mlx_align.api",
    "compare": "mlx_align.api",
    "compare_answers": "mlx_align.api",
    "export_model": "mlx_align.api",
    "import_model": "mlx_align.api",
    "convert_model": "mlx_align.api",
    "open_model": "mlx_align.model.open",
    "SamplingSettings": "mlx_align.rollout.sampler",
    "METHODS": "mlx_align.losses",
    "AlignError": "mlx_align.errors",
}
__all__ = list(_PUBLIC)


def __getattr__(name):
    # Heavy imports wait until they are needed, so that `mlx-align --help` answers at once.
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'mlx_align' has no attribute {name!r}")
