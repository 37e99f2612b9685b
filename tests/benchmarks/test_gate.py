"""No speed without a right result: the gate, and the comparison that obeys it."""

import math

import pytest
import torch

from dpo_fast.bench.case import Case, Contest, LeftOut, Variant
from dpo_fast.bench.compare import compare
from dpo_fast.bench.gate import Gate
from dpo_fast.bench.heads.gold import HeadResult, head_gate
from dpo_fast.bench.heads.inputs import HeadShape, Inputs, make_inputs
from dpo_fast.bench.heads.variants import HEADS, Step
from dpo_fast.bench.run import run_case
from dpo_fast.bench.settings import Settings
from dpo_fast.integrations.interface import InterfaceChanged

SHAPE = HeadShape(rows=24, vocab=61, hidden=16, pairs=2)


@pytest.fixture
def inputs() -> Inputs:
    return make_inputs(SHAPE, "cpu")


def test_limits_follow_the_naive_loop_between_soft_and_hard() -> None:
    gate = Gate(lambda output: output, {"logps": 1e-2}, {"logps": 1.0})
    assert gate.limit("logps") == 1e-2
    gate.calibrate({"logps": 0.1})
    assert gate.limit("logps") == pytest.approx(0.4)
    gate.calibrate({"logps": 50.0})
    assert gate.limit("logps") == 1.0
    assert gate.refusal({"logps": 1.0}) is None
    assert "off by 1.10e+00" in str(gate.refusal({"logps": 1.1}))
    assert gate.refusal({"logps": math.nan}) is not None


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", ["naive", "TRL 0.24 style", "dpo_fast", "dpo_fast per token"])
def test_right_heads_pass(name: str, frozen: bool) -> None:
    shape = HeadShape(rows=24, vocab=61, hidden=16, pairs=2, frozen=frozen)
    x = make_inputs(shape, "cpu")
    errors = head_gate(x).measure(HEADS[name](x)())
    assert set(errors) == {"logps", "dhidden"} | (set() if frozen else {"dweight"})
    assert max(errors.values()) < 2e-4


def scaled(x: Inputs, part: str, factor: float) -> Step:
    """The naive head with one result multiplied."""
    right = HEADS["naive"](x)
    return lambda: right()._replace(**{part: getattr(right(), part) * factor})


@pytest.mark.parametrize("part", ["logps", "dhidden", "dweight"])
@pytest.mark.parametrize("factor", [0.0, 0.5, -1.0, 2.0, 1.1, math.nan])
def test_a_wrong_head_gets_no_speed(inputs: Inputs, part: str, factor: float) -> None:
    contest = Contest(
        [
            Variant("naive", lambda: HEADS["naive"](inputs)),
            Variant("wrong", lambda: scaled(inputs, part, factor)),
        ],
        head_gate(inputs),
    )
    rows = compare(contest, 1, "cpu")
    assert rows["naive"]["seconds"] > 0
    assert "seconds" not in rows["wrong"] and "peak_mib" not in rows["wrong"]
    assert part in rows["wrong"]["refused"]


def test_absent_and_failing_peers_are_named_and_ours_raises(inputs: Inputs) -> None:
    def absent() -> Step:
        raise LeftOut("it is not installed: pip install it")

    def failing() -> Step:
        raise RuntimeError("no kernel image\nmore lines")

    gate = head_gate(inputs)
    rows = compare(Contest([Variant("A", absent), Variant("B", failing)], gate), 1, "cpu")
    assert rows["A"] == {"left_out": "it is not installed: pip install it"}
    assert rows["B"] == {"left_out": "failed: RuntimeError: no kernel image"}
    with pytest.raises(RuntimeError, match="no kernel image"):
        compare(Contest([Variant("dpo_fast min-memory", failing)], gate), 1, "cpu")


def test_a_changed_interface_raises(inputs: Inputs) -> None:
    def changed() -> Step:
        raise InterfaceChanged("trl 9.9 takes other arguments")

    with pytest.raises(InterfaceChanged, match=r"9\.9"):
        compare(Contest([Variant("TRL", changed)], head_gate(inputs)), 1, "cpu")


def test_a_case_as_it_stands_in_the_file(inputs: Inputs) -> None:
    variant = Variant("dpo_fast", lambda: HEADS["dpo_fast"](inputs), work=1e6)
    contest = Contest([variant], head_gate(inputs), flop=1e6, notes={"a": 1})
    case = Case("base", {"N": 24.0}, lambda: contest, ("N",))
    found = run_case(case, Settings(quick=True, rounds=4), {})
    top, row = found["ceilings"], found["rows"]["dpo_fast"]
    best = max(top["gemm_flops"], top["fma_flops"] or 0.0)
    assert found["floor_seconds"] == pytest.approx(1e6 / best)
    assert len(row["all_seconds"]) == 4 and row["over_ours"] == 1.0 and row["work"] == 1e6
    assert row["quartiles"][0] <= row["seconds"] <= row["quartiles"][1]


def test_the_inputs_are_the_same_compact_and_padded(inputs: Inputs) -> None:
    assert torch.equal(inputs.scored(inputs.padded), inputs.hidden)
    assert torch.equal(inputs.labels[inputs.labels != -100], inputs.target)
    share = inputs.target.numel() / inputs.labels.numel()
    assert share == pytest.approx(0.5 * 0.7, abs=0.05)  # half prompt, three tenths padding


def test_head_results_are_what_the_gate_wants() -> None:
    assert HeadResult._fields == ("logps", "dhidden", "dweight")
