"""The text that MLX writes for our kernels compiles and computes; elsewhere the emulator writes one."""

import re

import mlx.core as mx
import pytest
from harness import use_kernels

from mlx_align.kernels import check
from mlx_align.kernels.dispatch import Variant


@pytest.fixture
def written(monkeypatch, capfd, tmp_path, emulator):
    """Our kernels run as MLX writes them; the texts by name."""
    from metal.emulator.build import HEADERS

    texts = {}

    class Written(emulator.metal_kernel):
        def __call__(self, **call):
            kernel = mx.fast.metal_kernel(
                self.name, self.input_names, self.output_names, self.source, self.header
            )

            def start(*inputs):
                return kernel(**{**call, "inputs": list(inputs)}, verbose=True)

            # Without Metal it writes kernels for functions that are exported, and for nothing else.
            mx.export_function(str(tmp_path / "kernel.mlxfn"), start, *call["inputs"])
            texts[self.name] = capfd.readouterr().out.split("```")[1]
            return super().__call__(**call)

        def _run(self, library, function, *rest):
            text = texts[self.name]
            name = re.search(r"\[\[kernel\]\] void (\w+)", text)[1]
            library = emulator.Library(
                f'#include "mlx_custom_kernel.h"\n{text}', [HEADERS], self.name
            )
            return super()._run(library, name, *rest)

    use_kernels(monkeypatch, Written)
    return texts


@pytest.mark.parametrize(
    ("variant", "count"),
    [(Variant("tree_attention", "bfloat16", 64), 4), (Variant("token_log_prob", "float16"), 3)],
)
def test_what_mlx_writes_is_right(written, variant, count):
    errors = check.check_kernel(variant)
    assert max(errors.values()) < check.TOLERANCE[variant.dtype]
    assert len(written) == count
    for text in written.values():
        assert "const device" in text and "const constant" not in text
