"""The Markdown, the picture and the fits, on literal numbers."""

import struct

import pytest

from dpo_fast.bench.fit import axes_of, curve, exponent, exponents
from dpo_fast.bench.picture import draw, main_cases, most_telling
from dpo_fast.bench.report import markdown, number
from tests.benchmarks.literal import result


def test_a_table_says_everything() -> None:
    text = markdown(result())
    assert "| naive | 1000 | 900 .. 1100 | 10.00 | 0.06 | 64 | 2.0e-01 |" in text
    assert "| dpo_fast | 100 | 90 .. 110 | 1.00 | 0.64 | 4 | 1.0e-06 |" in text
    assert "GEMM 32 GFLOP/s (float32), FMA from registers 60 GFLOP/s, copy 17.6 GB/s" in text
    assert "commit abc" in text and "Liger 0.8.5" in text and "TRL absent" in text


def test_what_has_no_number_says_why_and_shows_none() -> None:
    text = markdown(result())
    assert "| TRL | left out |  |  |  |  |  |" in text
    assert "| Liger | refused |  |  |  |  | 5.0e+00 |" in text
    assert "- TRL: trl is not installed: pip install trl" in text
    assert "- Liger: logps is off by 5.00e+00: no speed" in text


def test_exponents_of_powers() -> None:
    cases = result()["cases"]
    assert axes_of(cases) == ["N"]
    found = exponents(cases)["N"]
    assert found == pytest.approx({"naive": 2.0, "dpo_fast": 1.0, "limit": 1.0})
    assert curve(cases, "N")["naive"] == [(2.0, 0.004), (4.0, 0.016), (8.0, 0.064)]
    assert "| naive | 2.00 |" in markdown(result())


def test_no_exponent_of_two_points() -> None:
    assert exponent([(1.0, 1.0), (2.0, 2.0)]) is None
    assert exponent([(1.0, 1.0), (2.0, 2.0), (2.0, 2.1)]) is None


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0123, "0.0123"), (1.234, "1.23"), (12.34, "12.3"), (1234.5, "1234"), (4.0, "4"), (0, "0")],
)
def test_three_digits(value: float, text: str) -> None:
    assert number(value) == text


def test_picture_has_a_panel_for_each_main_case_accuracy_and_curve() -> None:
    found = result()
    assert main_cases(found) == ["base"]
    assert main_cases({"cases": {n: c for n, c in found["cases"].items() if n != "base"}}) == [
        "N = 8"
    ]
    assert most_telling(found, ["base"]) == "base"  # errors 0.2 and 1e-6
    image = draw(found)
    assert image.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", image[16:24])
    assert width > 1.5 * height  # three panels beside each other


def test_picture_of_one_case_without_curves_memory_or_limit() -> None:
    found = result()
    case = found["cases"]["base"]
    case["floor_seconds"] = None
    for row in case["rows"].values():
        row.pop("peak_mib", None)
        if "errors" in row:
            row["errors"] = {}
    found["cases"] = {"base": case}
    assert draw(found).startswith(b"\x89PNG")
    assert "| naive | 1000 |" in markdown(found)
