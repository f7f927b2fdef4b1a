"""The page that says where TorchJD's and LibMTL's methods are: nothing is forgotten, and every name exists."""

import importlib
import pathlib
import re

import pytest

import mogb
from mogb.base import option_names
from mogb.recommend import behaviour
from mogb.wrappers import WRAPPERS

PAGE = (pathlib.Path(__file__).parents[2] / "docs" / "methods-compared.md").read_text()
# Of version 0.18.0, so that the page is checked where TorchJD is not installed.
TORCHJD = {
    "Aggregator", "AlignedMTL", "AlignedMTLWeighting", "CAGrad", "CAGradWeighting", "ConFIG", "Constant",
    "ConstantWeighting", "CRMOGMWeighting", "DualProj", "DualProjWeighting", "ExcessMTL", "ExcessMTLWeighting",
    "FairGrad", "FairGradWeighting", "GradDrop", "GradVac", "GradVacWeighting", "GramianWeightedAggregator",
    "IMTLG", "IMTLGWeighting", "Krum", "KrumWeighting", "Mean", "MeanWeighting", "MGDA", "MGDAWeighting",
    "MoDoWeighting", "NashMTL", "PCD", "PCDWeighting", "PCGrad", "PCGradWeighting", "Random", "RandomWeighting",
    "SDMGradWeighting", "Sum", "SumWeighting", "TrimmedMean", "UPGrad", "UPGradWeighting", "WeightedAggregator",
    "Weighting", "COSMOS", "DWA", "FAMO", "GeometricMean", "IMTLL", "PBI", "Scalarizer", "STCH", "UW"
}  # fmt: skip
LIBMTL = {
    "EW", "GradNorm", "UW", "MGDA", "DWA", "GLS", "PCGrad", "GradDrop", "IMTL", "GradVac", "CAGrad", "Nash_MTL",
    "RLW", "MoCo", "Aligned_MTL", "FAMO", "SDMGrad", "MoDo", "STCH", "ExcessMTL", "FairGrad", "DB_MTL", "UPGrad",
    "MOML", "Auto_Lambda", "FORUM"
}  # fmt: skip


def rows(section):
    """Their names, ours, and what differs."""
    text = PAGE.split(f"\n## {section}\n", 1)[1].split("\n## ", 1)[0]
    found = []
    for line in text.splitlines():
        if line.startswith("| ") and not line.startswith(("|---", f"| {section.split()[0]} |")):
            theirs, ours, differs = (cell.strip() for cell in line.strip("|").split("|"))
            found.append((re.findall(r"`(\w+)`", theirs), ours, differs))
    return found


def named(section):
    return [name for theirs, _, _ in rows(section) for name in theirs]


@pytest.mark.parametrize(("section", "known"), [("TorchJD 0.18.0", TORCHJD), ("LibMTL", LIBMTL)])
def test_every_method_is_there_once(section, known):
    assert sorted(named(section)) == sorted(known)


@pytest.mark.parametrize("section", ["TorchJD 0.18.0", "LibMTL"])
def test_ours_exist(section):
    for theirs, ours, differs in rows(section):
        names = re.findall(r"`(\w+)`", ours)
        assert ours in ("interface", "left out") or names, theirs
        assert set(names) <= set(mogb.registered()), theirs
        for option in re.findall(r"`(\w+)=", differs):
            assert any(option in option_names(mogb.aggregators.get(name)) for name in names), (theirs, option)
        if ours == "left out":
            assert differs


@pytest.mark.parametrize("module", ["aggregation", "scalarization"])
def test_the_page_names_all_public_classes_of_the_installed_torchjd(module):
    pytest.importorskip("torchjd")
    public = set(importlib.import_module(f"torchjd.{module}").__all__)
    assert public <= set(named("TorchJD 0.18.0"))


def test_what_is_in_neither_is_all_the_rest():
    text = PAGE.split("## Here and in neither", 1)[1].split("\n## ", 1)[0]
    here = set(re.findall(r"`([\w.]+)`", text))
    elsewhere = {name for section in ("TorchJD 0.18.0", "LibMTL") for _, ours, _ in rows(section)
                 for name in re.findall(r"`(\w+)`", ours)}  # fmt: skip
    assert not here & elsewhere
    assert set(behaviour()["methods"]) <= here | elsewhere  # a new method may wait, as it does for its measurement
    assert set(WRAPPERS) <= here
