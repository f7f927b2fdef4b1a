"""Every reference case: agreement by the tolerance of its kind, and each exception by name.

``parity_table.py`` makes the comparison; run ``python -m tests.mogb.parity_table`` for the table. An exception has a
reason there, and a check that ours is the better answer: shorter, free of conflict, at the fixed point, or simply
finite; the reasons of ``parity_rest.py`` are proved in ``test_parity_more.py`` and ``test_parity_losses.py``.
"""

import math

import parity_table
import pytest
from parity_rest import COMPARED
from parity_table import FLOAT32, OURS, SOLVER, reference, rows, summary, unaccounted

# Where the reference is no target. A case that leaves or joins this list must be moved here by hand.
EXCEPTIONS = {
    "official code raises IndexError": "nash-005 nash-020 nash-050 nash-110",
    "official solver fails and returns weights of 1, or stops early": (
        "nash-026 nash-027 nash-056 nash-057 nash-117 libmtl-028 libmtl-064 torchjd-045 torchjd-104"
    ),
    "official weights never reach 0 and 1": (
        "nash-108 nash-109 famo-036 sener-056 sener-057 sener-060 sener-061 samsung-046 libmtl-129 libmtl-131 pmtl-006 "
        "pmtl-016"
    ),
    "convention: where g_w = 0, the mean gradient is not rescaled": (
        "nash-113 nash-115 nash-205 nash-206 nash-208 nash-209 nash-211 nash-212 nash-214 nash-215 famo-037 "
        "cagrad-024 cagrad-025 cagrad-026 cagrad-027 cagrad-092 cagrad-094 cagrad-095 cagrad-097 cagrad-098 "
        "cagrad-100 libmtl-135"
    ),
    "official code gives NaN": (
        "nash-118 famo-038 config-068 config-069 config-070 config-071 config-072 config-073 libmtl-134"
    ),
    "official solver stops early": (
        "famo-006 cagrad-030 cagrad-031 cagrad-033 cagrad-034 cagrad-035 cagrad-036 cagrad-037 cagrad-038 "
        "cagrad-039 cagrad-040 cagrad-041 cagrad-042 cagrad-043 cagrad-044 cagrad-045 cagrad-046 cagrad-056 "
        "cagrad-057 cagrad-058 cagrad-059 cagrad-060 cagrad-061 cagrad-062 cagrad-063 cagrad-064 torchjd-034"
    ),
    "official code raises UnboundLocalError": "sener-058 sener-059 sener-062 sener-063 libmtl-130 libmtl-132",
    "official code divides by a zero norm": "config-075",
    "official code raises RuntimeError": "libmtl-017 libmtl-035 libmtl-071 libmtl-143",
    "official ridge: the direction conflicts": "libmtl-067 torchjd-088 torchjd-090 torchjd-092 torchjd-233",
    "official code raises NameError": "go4-001",
    "the official call returns 0 inside of the sector; ours goes on to descend": "pmtl-004 pmtl-020",
    "TorchJD updates the weights at the first call already; the official code does not": "torchjd-237",
    "official code gives 0 where g_w = 0": "torchjd-215 torchjd-216 torchjd-217 torchjd-218",
}
IDS = {index for ids in EXCEPTIONS.values() for index in ids.split()}


@pytest.fixture(scope="module")
def found():
    return {row.id: row for row in rows()}


def test_no_reference_method_is_skipped_silently():
    assert unaccounted() == []
    assert not set(OURS) & set(COMPARED)


def test_every_case_agrees_or_is_a_listed_exception(found):
    off = {index: row for index, row in found.items() if not row.agrees}
    unlisted = "\n".join(str(row) for index, row in off.items() if index not in IDS)
    assert not unlisted
    assert not IDS - set(off), "these agree by now: take them off the list"


def test_every_exception_has_its_reason(found):
    for reason, ids in EXCEPTIONS.items():
        for index in ids.split():
            assert found[index].exception == reason, found[index]


def test_exact_solutions_are_met_without_exception(found):
    exact = [row for row in found.values() if row.method.startswith("exact_")]
    assert len(exact) == 66
    assert max(row.deviation for row in exact) <= 1e-8


def test_the_count_to_publish(found, record_property):
    record_property("parity", summary(list(found.values())))
    assert len(found) == len(reference()["cases"]) == 647
    assert len(IDS) == 107
    agreeing = [row for row in found.values() if row.agrees]
    assert not any(math.isnan(row.deviation) for row in agreeing)
    assert {row.tolerance for row in agreeing} == {1e-8, FLOAT32, SOLVER}
    assert sum("steps" in row.matrix for row in found.values()) == 10


def test_the_printed_table_has_every_case_and_no_unexplained_one(found, monkeypatch, capsys):
    monkeypatch.setattr(parity_table, "rows", lambda: list(found.values()))
    parity_table.main()
    printed = capsys.readouterr().out
    assert printed.startswith("647 reference cases compared: 540 agree, 107 exceptions.")
    assert "UNEXPLAINED" not in printed
