"""The choice of a backend, what is said when one is missing, and the debug switch."""

from __future__ import annotations

import subprocess
import sys
import types

import pytest
import torch

from co2s_fast import ops
from co2s_fast.losses import masked_cross_entropy, softmax_confidence
from co2s_fast.ops import catalogue, dispatch

ABSENT = [name for name in ops.BACKENDS if not ops.backend_status()[name].live]


def python(code: str, **environment: str) -> str:
    import os

    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_status_tells_why_and_what_to_do():
    status = ops.backend_status()
    assert tuple(status) == ("reference", "cpp", "triton", "cuda")
    assert status["reference"].live
    for entry in status.values():
        assert bool(entry.why) == bool(entry.fix) == (not entry.live)


def test_forced_backend_serves_and_is_restored():
    default = ops.backend("cpu")
    with ops.use_backend("reference"):
        assert ops.backend(torch.zeros(1)) == "reference"
    assert ops.backend("cpu") == default


def test_forced_backend_is_restored_after_an_error():
    default = ops.backend("cpu")
    with pytest.raises(KeyError), ops.use_backend("reference"):
        raise KeyError
    assert ops.backend("cpu") == default


def test_unknown_backend():
    with pytest.raises(ValueError, match="use_backend: got 'numpy', expected one of reference"):
        ops.use_backend("numpy").__enter__()


@pytest.mark.skipif(not ABSENT, reason="every backend is live")
def test_absent_backend_never_falls_back():
    with pytest.raises(RuntimeError, match=f"{ABSENT[0]!r} is not live: .*Fix: "):
        ops.use_backend(ABSENT[0]).__enter__()


def test_forced_backend_refuses_other_devices(monkeypatch):
    monkeypatch.setattr(dispatch, "_forced", "cuda")
    with pytest.raises(RuntimeError, match="'cuda' was asked for but cannot serve cpu tensors"):
        softmax_confidence(torch.zeros(1, 2, 3, 3))


def test_default_order(monkeypatch):
    live = {"cuda": "", "triton": "", "cpp": ""}
    monkeypatch.setattr(dispatch, "_why_not", lambda name, device: live[name])
    choose = dispatch._default.__wrapped__
    assert (choose("cuda"), choose("cpu")) == ("cuda", "cpp")
    live["cuda"] = "not built"
    assert choose("cuda") == "triton"
    live["triton"], live["cpp"] = "not installed", "not built"
    for device, wanted in (("cuda", "triton"), ("cpu", "cpp")):
        with pytest.warns(RuntimeWarning, match=f"not.*To get the {wanted} backend: pip install"):
            assert choose(device) == "reference"


MISSING_NATIVE = """
import sys, warnings
sys.modules["co2s_fast._native"] = None  # what an installation without a compiler looks like
import torch
from co2s_fast.losses import softmax_confidence
from co2s_fast import ops
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        softmax_confidence(torch.zeros(1, 2, 3, 3))
    ops.backend("cpu")
print(ops.backend("cpu"), len(caught), ops.load_native(), caught[0].message)
"""


def test_without_the_native_library_one_warning_and_the_reference():
    text = python(MISSING_NATIVE)
    assert text.startswith("reference 1 None ")
    assert "native library could not be loaded" in text and "pip install" in text


def test_a_library_of_other_sources_is_not_loaded():
    """Loading it would abort the process: its kernels do not fit the schemas."""
    stale = MISSING_NATIVE.replace(
        'sys.modules["co2s_fast._native"] = None',
        "from co2s_fast.ops import dispatch\n"
        'dispatch.build_record = lambda: {"built": True, "operators": "another"}',
    )
    text = python(stale)
    assert text.startswith("reference 1 None ")
    assert "built from other sources" in text and "pip install" in text


def test_the_build_records_what_it_was_built_for():
    record = dispatch.build_record()
    if not record.get("built"):
        pytest.skip("the native part was not built here")
    assert record["operators"] == catalogue.fingerprint()
    assert record.get("torch", torch.__version__) == torch.__version__


def test_a_library_for_another_torch_is_not_loaded():
    stale = MISSING_NATIVE.replace(
        'sys.modules["co2s_fast._native"] = None',
        "from co2s_fast.ops import dispatch\n"
        'dispatch.build_record = lambda: {"built": True, "torch": "2.8.0"}',
    )
    text = python(stale)
    assert text.startswith("reference 1 None ")
    assert "was built for torch 2.8.0, this is " in text and "pip install" in text


@pytest.mark.parametrize("content", ["", '{"built": tr', "[]", b"\xff\xfe"])
def test_a_damaged_record_counts_as_none(content, tmp_path, monkeypatch):
    monkeypatch.setattr(dispatch, "__file__", str(tmp_path / "ops" / "dispatch.py"))
    assert dispatch.build_record() == {}
    path = tmp_path / "_native_build.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    record = dispatch.build_record()
    assert set(record) == {"damaged"} and str(path) in record["damaged"]
    assert dispatch._build_failure() == ""


@pytest.mark.parametrize(
    ("built", "runs_on", "not_on"),
    [
        ("86;90", ["8.6", "8.9", "9.0", "12.0"], ["7.5", "8.0"]),
        ("80;86;90", ["8.0", "8.9", "9.0", "12.0"], ["7.5"]),
        ("90a", ["9.0"], ["8.0", "8.9", "10.0", "12.0"]),
        ("90", ["9.0", "10.0"], ["8.0", "8.9"]),
        ("120", ["12.0"], ["9.0", "10.0"]),
    ],
)
def test_cuda_is_live_only_where_the_library_has_code_for_the_gpu(
    built, runs_on, not_on, monkeypatch
):
    stub = types.SimpleNamespace(build_info=lambda: {"cuda_archs": built})
    monkeypatch.setitem(sys.modules, "co2s_fast._native", stub)
    monkeypatch.setattr(dispatch, "_load_native", lambda: "")
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda *a: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability in runs_on + not_on:
        numbers = tuple(map(int, capability.split(".")))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda n=numbers: n)
        why = dispatch._native_status.__wrapped__("CUDA")
        assert (why == "") == (capability in runs_on), why
        sm = capability.replace(".", "")
        assert not why or why.endswith(f"architectures {built}, this GPU is sm_{sm}: "
                                       f"build it again with CO2S_CUDA_ARCHS={sm}")  # fmt: skip


def test_import_loads_neither_native_code_nor_triton():
    code = (
        "import sys, co2s_fast.losses\n"
        "print([m for m in ('co2s_fast._native', 'co2s_fast.kernels', 'triton') "
        "if m in sys.modules])"
    )
    assert python(code).strip() == "[]"


def test_debug_checks_switch_and_block():
    assert not dispatch.debugging()
    with ops.debug_checks(True):
        assert dispatch.debugging()
        with ops.debug_checks(False):
            assert not dispatch.debugging()
        assert dispatch.debugging()
    assert not dispatch.debugging()
    ops.debug_checks(True)
    assert dispatch.debugging()
    ops.debug_checks(False)
    assert not dispatch.debugging()


@pytest.mark.gpu
def test_debug_checks_find_bad_classes_on_the_gpu():
    logits = torch.zeros(1, 3, 2, 2, device="cuda")
    label = torch.full((1, 2, 2), 3, device="cuda")
    assert masked_cross_entropy(logits, label).item() == 0
    with ops.debug_checks(True), pytest.raises(IndexError, match=r"target: class 3.*\[0, 3\)"):
        masked_cross_entropy(logits, label)


def test_threads_may_meet_at_the_first_use():
    print(python(
        "import threading, time\n"
        "from co2s_fast.ops import catalogue, dispatch\n"
        "define, failed, start = catalogue.define, [], threading.Barrier(4)\n"
        "def slow(*args):\n"
        "    time.sleep(0.05)\n"
        "    return define(*args)\n"
        "def first():\n"
        "    start.wait()\n"
        "    try:\n"
        "        dispatch.load_native()\n"
        "    except RuntimeError as error:\n"
        "        failed.append(error)\n"
        "catalogue.define = slow\n"
        "threads = [threading.Thread(target=first) for _ in range(4)]\n"
        "for thread in threads: thread.start()\n"
        "for thread in threads: thread.join()\n"
        "assert not failed, failed[0]\n"
    ))
