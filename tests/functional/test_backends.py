"""The choice of a backend: by name obeyed or refused, otherwise made and logged once."""

import logging

import pytest
import torch

from dpo_fast import backends
from dpo_fast.backends.select import forget
from dpo_fast.functional import linear_logprobs
from tests.functional.cases import make_case


def test_auto_logs_choice_and_reason_once(caplog):
    forget()
    case = make_case(3)
    with caplog.at_level(logging.INFO, logger="dpo_fast"):
        for _ in range(3):
            linear_logprobs(case.hidden, case.weight, case.target)
    (record,) = [r for r in caplog.records if "LM head" in r.getMessage()]
    message = record.getMessage()
    assert "cpu" in message and "float32" in message
    assert "'cpu'" in message and "processor" in message


def test_auto_on_the_cpu_in_float64_says_why_not_the_compiled_head(caplog):
    forget()
    with caplog.at_level(logging.INFO, logger="dpo_fast"):
        assert backends.choose("auto", "cpu", torch.float64).name == "chunked"
    assert "not cpu: it takes float32, bfloat16 and float16, not torch.float64" in caplog.text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_triton_by_name_raises_with_the_reason(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # where kernels may run on the CPU
    forget()
    case = make_case(3)
    with pytest.raises(ValueError, match=r"backend='triton' cannot run.*'cpu'.*backend='auto'"):
        linear_logprobs(case.hidden, case.weight, case.target, backend="triton")


@pytest.mark.parametrize("name", ["naive", "chunked", "cpu"])
def test_names_are_obeyed(name):
    assert backends.choose(name, "cpu", torch.float32).name == name


def test_every_backend_has_the_interface():
    members = {n for n in vars(backends.HeadBackend) if not n.startswith("_")}
    members |= {"name", "gradients_may_wait"}
    for name in ("naive", "chunked", "cpu"):
        backend = backends.choose(name, "cpu", torch.float32)
        assert all(hasattr(backend, member) for member in members)


def test_a_missing_module_is_said_once(monkeypatch, caplog):
    import sys

    from dpo_fast.backends.compiled import compiled

    compiled.cache_clear(), forget()
    monkeypatch.setitem(sys.modules, "dpo_fast._C", None)
    monkeypatch.delattr("dpo_fast._C", raising=False)
    case = make_case(9, bias=True, softcap=3.0)
    try:
        with caplog.at_level(logging.WARNING, logger="dpo_fast"):
            for _ in range(2):
                without = linear_logprobs(case.hidden, case.weight, case.target, **case.kwargs)
        (record,) = caplog.records
        assert "'chunked'" in record.getMessage() and "doctor" in record.getMessage()
        with pytest.raises(ValueError, match=r"backend='cpu' cannot run.*_C is missing"):
            backends.choose("cpu", "cpu", torch.float32)
    finally:
        compiled.cache_clear(), forget()
    monkeypatch.undo()
    with_module = linear_logprobs(case.hidden, case.weight, case.target, **case.kwargs)
    torch.testing.assert_close(with_module, without)
