"""A kernel is used only where it may be, was found right, and was found faster."""

import json
import logging
import sys

import mlx.core as mx
import pytest

from mlx_align.cli import main
from mlx_align.errors import SettingsError
from mlx_align.kernels import check, dispatch, source
from mlx_align.kernels.dispatch import Variant
from mlx_align.kernels.doctor import Diagnosis, Finding, diagnose

HALF = Variant("tree_attention", "float16", 64)


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine with Metal, an empty cache, and checks that find what `found` says; their variants."""
    monkeypatch.setenv("MLX_ALIGN_CACHE", str(tmp_path))
    monkeypatch.delenv(dispatch.MODE, raising=False)
    monkeypatch.setattr(dispatch, "metal_available", lambda: True)
    for cache in (dispatch.find_verdict, dispatch._say):
        cache.cache_clear()

    def make(**found):
        found = {"failure": None, "errors": {}, "timings": [], **found}
        checked = []

        def run(variant):
            checked.append(variant)
            return found

        monkeypatch.setattr(dispatch, "_run_check", run)
        return checked

    yield make
    dispatch.find_verdict.cache_clear()


TIMINGS = [
    [[512, 1], 3.0, {"segment loop": 2.0, "unfused": 4.0}],
    [[512, 64], 1.0, {"segment loop": 2.0, "unfused": 4.0}],
    [[8192, 1], 5.0, {"segment loop": 6.0}],
]


def test_off_and_on_ask_nobody(machine, monkeypatch):
    checked = machine()
    monkeypatch.setenv(dispatch.MODE, "off")
    assert not dispatch.use(HALF, (512, 1))
    monkeypatch.setenv(dispatch.MODE, "on")
    assert dispatch.use(HALF, (512, 1))
    assert checked == []


def test_no_metal_no_kernel(machine, monkeypatch):
    checked = machine()
    monkeypatch.setattr(dispatch, "metal_available", lambda: False)
    for mode in ("off", "on", "auto"):
        monkeypatch.setenv(dispatch.MODE, mode)
        assert not dispatch.use(HALF, (512, 1))
    assert checked == []


def test_other_modes_are_mistakes(machine, monkeypatch):
    machine()
    monkeypatch.setenv(dispatch.MODE, "yes")
    with pytest.raises(
        SettingsError, match=r"\$MLX_ALIGN_KERNELS: 'yes' is not one of off, on, auto"
    ):
        dispatch.use(HALF, (512, 1))


@pytest.mark.parametrize(
    ("size", "used"),
    [((512, 1), False), ((400, 2), False), ((600, 40), True), ((16_384, 3), True), ((2, 1), False)],
)
def test_the_nearest_timing_decides(machine, size, used):
    checked = machine(timings=TIMINGS)
    assert dispatch.use(HALF, size) == used
    assert checked == [HALF]


def test_a_slower_kernel_is_told_once(machine, caplog):
    machine(timings=TIMINGS)
    caplog.set_level(logging.INFO, "mlx_align")
    for size in ((512, 1), (500, 1), (512, 1)):
        assert not dispatch.use(HALF, size)
    assert [r.message for r in caplog.records] == [
        "checking the Metal kernel tree_attention float16 64, once on this machine",
        "tree_attention float16 64: MLX's own operations are faster at about 512 x 1",
    ]


def test_a_kernel_that_fails_is_told_once(machine, caplog):
    machine(failure="it is wrong: out 3.0e-01 (limit 5e-03)")
    for _ in range(3):
        assert not dispatch.use(HALF, (512, 64))
    assert [r.message for r in caplog.records if r.levelno == logging.WARNING] == [
        "tree_attention float16 64: the Metal kernel is not used: it is wrong: out 3.0e-01 (limit 5e-03)"
    ]


def test_verdicts_are_kept(machine):
    checked = machine(timings=TIMINGS)
    dispatch.use(HALF, (512, 1))
    dispatch.find_verdict.cache_clear()  # as in another process
    assert dispatch.use(HALF, (512, 64))
    assert checked == [HALF]
    kept = json.loads(dispatch.verdicts_file().read_text())
    assert kept["machine"] == dispatch.machine() and list(kept["verdicts"]) == [str(HALF)]


@pytest.mark.parametrize("changed", ["source", "MLX"])
def test_verdicts_end_with_what_they_are_about(machine, monkeypatch, changed):
    checked = machine(timings=TIMINGS)
    dispatch.use(HALF, (512, 1))
    dispatch.find_verdict.cache_clear()
    if changed == "source":
        text = dispatch.read_source(HALF.file)
        monkeypatch.setattr(dispatch, "read_source", lambda file: text + "// changed\n")
    else:
        monkeypatch.setattr(mx, "__version__", "0.99")
    dispatch.use(HALF, (512, 1))
    assert checked == [HALF, HALF]


@pytest.mark.parametrize(
    "text",
    [
        '{"verdicts"',
        "[1, 2]",
        '{"verdicts": 3}',
        '{"verdicts": {"tree_attention float16 64": null}}',
        '{"verdicts": {"tree_attention float16 64": {"source": "SOURCE", "timings": 1}}}',
    ],
)
def test_a_broken_file_of_verdicts_is_none(machine, text):
    checked = machine(timings=TIMINGS)
    file = dispatch.verdicts_file()
    file.parent.mkdir(parents=True)
    file.write_text(text.replace("SOURCE", dispatch._source_hash(HALF)))
    assert not dispatch.use(HALF, (512, 1))
    assert checked == [HALF]
    dispatch.find_verdict.cache_clear()
    assert dispatch.use(HALF, (512, 64)) and checked == [HALF]


def test_a_verdict_that_cannot_be_kept_counts_all_the_same(machine, monkeypatch, tmp_path, caplog):
    checked = machine(timings=TIMINGS)
    (tmp_path / "file").touch()
    monkeypatch.setenv("MLX_ALIGN_CACHE", str(tmp_path / "file"))
    assert dispatch.use(HALF, (512, 64)) and not dispatch.use(HALF, (512, 1))
    assert checked == [HALF]
    assert "the verdict on the Metal kernel cannot be kept: " in caplog.text


def test_doctor_complains_of_a_mistaken_mode_at_once(machine, monkeypatch):
    machine()
    monkeypatch.setenv(dispatch.MODE, "yes")
    with pytest.raises(SettingsError):
        diagnose(lambda text: pytest.fail(text))


# -- the check itself --------------------------------------------------------------------------------


@pytest.mark.skipif(mx.metal.is_available(), reason="here the check works")
def test_a_check_that_fails_is_a_verdict(monkeypatch):
    verdict = dispatch._run_check(Variant("token_log_prob", "float32"))
    assert verdict["failure"].startswith("its check ended with status 1: ")
    assert "No Metal back-end" in verdict["failure"]


def test_a_check_that_takes_its_process_down_is_a_verdict(monkeypatch, tmp_path):
    crash = tmp_path / "crash"
    crash.write_text("#!/bin/sh\nkill -ABRT $$\n")
    crash.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(crash))
    assert dispatch._run_check(HALF)["failure"] == "its check ended with status -6: no message"


def test_a_check_that_hangs_is_a_verdict(monkeypatch, tmp_path):
    slow = tmp_path / "slow"
    slow.write_text("#!/bin/sh\nexec sleep 60\n")
    slow.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(slow))
    monkeypatch.setattr(dispatch, "LIMIT", 0.1)
    assert dispatch._run_check(HALF)["failure"] == "its check took longer than 0.1 s"


@pytest.fixture
def quick(monkeypatch):
    """Sizes that the emulator times in a moment."""
    monkeypatch.setattr(check, "ATTENTION_SIZES", ((40, 2),))
    monkeypatch.setattr(check, "LOG_PROB_SIZES", ((8, 300),))
    monkeypatch.setattr(check, "REPEATS", 1)


@pytest.mark.parametrize(
    "variant", [Variant("tree_attention", "float32", 64), Variant("token_log_prob", "float32")]
)
def test_a_check_of_right_kernels(kernels, quick, variant):
    found = check.check(variant)
    assert found["failure"] is None
    assert max(found["errors"].values()) < 1e-5 < min(check.TOLERANCE.values())
    (timing,) = found["timings"]
    assert timing.kernel > 0 and all(seconds > 0 for seconds in timing.others.values())
    assert dispatch._parse(json.loads(json.dumps(found))).timings == (timing,)


@pytest.mark.parametrize(
    ("variant", "right", "wrong"),
    [
        (Variant("tree_attention", "float32", 64), "key <= query &&", "key < query &&"),
        (Variant("tree_attention", "float32", 64), "0.0f : 1.0f / total", "0.0f : NAN"),
        (
            Variant("token_log_prob", "float32"),
            "if (j == target) factor +=",
            "if (j == target) factor -=",
        ),
    ],
)
def test_a_check_of_wrong_kernels(kernels, quick, monkeypatch, variant, right, wrong):
    text = source.read_source(variant.file)
    assert right in text
    monkeypatch.setattr(source, "read_source", lambda file: text.replace(right, wrong))
    failure = check.check(variant)["failure"]
    assert failure.startswith("it is wrong: ") and "(limit 1e-04)" in failure


@pytest.mark.parametrize("head_dim", [0, 64, 80])
@pytest.mark.parametrize("dtype", check.TOLERANCE)
def test_plain_paths_are_right_too(dtype, head_dim):
    variant = Variant("tree_attention" if head_dim else "token_log_prob", dtype, head_dim)
    assert max(check.check_plain(variant).values()) < check.TOLERANCE[dtype]


def verdict(failure=None):
    timings = tuple(dispatch.Timing(tuple(s), k, o) for s, k, o in TIMINGS)
    return dispatch.Verdict(failure, {} if failure else {"out": 2e-4}, () if failure else timings)


def test_doctor_where_there_is_no_metal():
    findings = [Finding(HALF, {"out": 3e-4, "q": 1e-3}, None)]
    found = Diagnosis(dispatch.machine(), "auto", False, findings)
    assert found.healthy
    text = "\n".join(found.lines())
    assert "tree_attention float16 64  right  1.0e-03  5e-03" in text
    assert text.endswith("Metal is not available here: no kernel was checked, and none is used.")


def test_doctor_where_there_is_metal():
    float32 = Variant("token_log_prob", "float32")
    findings = [
        Finding(HALF, {"out": 3e-4}, verdict()),
        Finding(float32, {"logp": 1e-7}, verdict("it is wrong: logp nan (limit 1e-04)")),
    ]
    found = Diagnosis(dispatch.machine(), "auto", True, findings)
    assert not found.healthy
    text = "\n".join(found.lines())
    assert "tree_attention float16 64  right  2.0e-04  5e-03" in text
    assert "token_log_prob float32     not used: it is wrong: logp nan (limit 1e-04)" in text
    rows = [line.split() for line in text.splitlines() if " x " in line and "." in line]
    shown = [" ".join(row[3:]) for row in rows]
    assert shown == [
        "512 x 1 3000.00 2000.00 4000.00 segment loop",
        "512 x 64 1000.00 2000.00 4000.00 kernel",
        "8,192 x 1 5000.00 6000.00 - kernel",
    ]


@pytest.mark.parametrize("error", [1.0, float("nan")])
def test_doctor_tells_when_plain_paths_are_wrong(error):
    found = Diagnosis(
        dispatch.machine(), "auto", False, [Finding(HALF, {"out": error, "q": 0.0}, None)]
    )
    assert not found.healthy
    assert any("WRONG" in line for line in found.lines())


@pytest.mark.skipif(mx.metal.is_available(), reason="there are kernels to check here")
def test_doctors_command(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["doctor"])
    assert ended.value.code == 0
    shown = capsys.readouterr()
    assert shown.out.count(" right ") == 18 and "Metal is not available here" in shown.out
    assert "checking tree_attention float16 64 ..." in shown.err


# -- the sources -------------------------------------------------------------------------------------


def test_kernels_of_a_source():
    kernels = source.read_kernels(source.read_source("token_log_prob"))
    assert list(kernels) == [f"token_log_prob_{n}" for n in ("forward", "gradient", "log_ratio")]
    gradient = kernels["token_log_prob_gradient"]
    assert gradient.inputs == (
        "logits", "targets", "log_sums", "target_factors", "softmax_factors", "sizes",
    )  # fmt: skip
    assert gradient.outputs == ("dlogits",)
    assert "[[kernel]]" not in gradient.header and "namespace mlx_align" in gradient.header
    assert gradient.body.count("dlogits[") == 1 and "VARIANT" not in gradient.body


def test_names_differ_with_source_and_template(monkeypatch):
    names = []

    def maker(**parts):
        names.append(parts["name"])
        return lambda **call: [mx.zeros(8)]

    monkeypatch.setattr(source, "kernel_maker", lambda: maker)
    text = source.read_source("token_log_prob")

    def launch(dtype):
        arguments = {"grid": (1, 1, 1), "threadgroup": (1, 1, 1), "outputs": []}
        source.launch(
            "token_log_prob", "token_log_prob_forward", [mx.zeros(8)] * 3, {"T": dtype}, **arguments
        )

    launch(mx.float32)
    launch(mx.float32)
    launch(mx.float16)
    monkeypatch.setattr(source, "read_source", lambda file: text + "// changed\n")
    launch(mx.float32)
    assert len(set(names)) == len(names) == 3


def test_arrays_too_small_for_the_device_are_refused():
    with pytest.raises(ValueError, match=r"fewer than 8 elements: \[\(7,\)\]"):
        source.launch(
            "token_log_prob", "token_log_prob_forward", [mx.zeros(7)], {},
            grid=(1, 1, 1), threadgroup=(1, 1, 1), outputs=[],
        )  # fmt: skip
