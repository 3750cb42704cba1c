"""Promises of scaling.py: exponents are those of a power law, memory is measured above the weights,
the table holds the numbers."""

import pytest
import torch

from experiments import scaling


def test_exponents_of_a_power_law_are_found_and_the_end_may_differ():
    assert scaling.exponents([1, 2, 4], [3, 12, 48]) == {"fit": 2.0, "end": 2.0}
    bent = scaling.exponents([1, 2, 4, 8], [5, 5, 5, 10])
    assert bent["end"] == 1.0 and 0 < bent["fit"] < 1


def test_the_time_of_the_first_call_is_left_out_and_the_peak_is_that_above_before(monkeypatch):
    times, GIB = iter([0.0, 9.0, 10.0, 11.0, 20.0, 23.0]), scaling.GIB
    monkeypatch.setattr(scaling.time, "perf_counter", lambda: next(times))
    monkeypatch.setattr(scaling, "peak_memory", lambda device: 5 * GIB)
    calls = []
    seconds, gib = scaling.measured(lambda: calls.append(1), torch.device("cpu"), 2 * GIB, 2)
    assert (len(calls), seconds, gib) == (3, 2.0, 3.0)


def made() -> dict:
    """Time like the axis, memory like its square."""
    found = {}
    for what, (values, _, _) in scaling.AXES.items():
        found[what] = {"points": list(values)}
        for name in scaling.WORK:
            units = {"ms_an_image": [float(v) for v in values], "mib": [v * v for v in values]}
            exponents = {unit: scaling.exponents(values, y) for unit, y in units.items()}
            found[what][name] = {**units, "exponents": exponents}
    return found


def test_the_table_has_a_line_for_each_axis_and_each_work():
    lines = scaling.table(made()).splitlines()[2:]
    assert len(lines) == len(scaling.AXES) * len(scaling.WORK)
    assert "| 16 to 256 | 1.00 (1.00) | 256 to 65,536 | 2.00 (2.00) |" in lines[0]


def test_a_point_is_what_a_child_measures(monkeypatch):
    small = scaling.tokenizer_config
    monkeypatch.setattr(scaling, "tokenizer_config", lambda **changes: small(
        encoder_width=32, encoder_depth=1, encoder_heads=2, decoder_width=32, decoder_depth=1,
        decoder_heads=2, codebook_size=16, **changes))
    encode_s, encode_gib, step_s, step_gib = scaling.point(4, 16, 64, torch.device("cpu"))
    assert 0 < encode_s < step_s and 0 <= encode_gib <= step_gib


def test_the_picture_can_be_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    scaling.draw(made(), str(tmp_path / "x.png"))
    assert (tmp_path / "x.png").stat().st_size > 10_000
