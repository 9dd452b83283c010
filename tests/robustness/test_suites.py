from __future__ import annotations

import json
import sys

import pytest

from snntorch_lr.robustness import SUITES, Descent, gradient_attack, suite


def test_settings_are_complete_and_json() -> None:
    for attack in (attack for members in SUITES.values() for attack in members):
        settings = json.loads(json.dumps(dict(attack.settings)))
        assert {"library"} | set(vars(attack.run)) == set(settings)


def test_suites_are_what_the_documentation_says() -> None:
    assert [attack.name for attack in suite("quick")] == ["FGSM", "PGD-20"]
    assert [attack.name for attack in suite("paper")] == ["FGSM", "RFGSM", "PGD", "MIFGSM"]
    assert not any(attack.needs_torchattacks for attack in suite("quick"))
    assert all(attack.needs_torchattacks for attack in suite("paper"))
    own = gradient_attack("mine", Descent(steps=2))
    assert suite(["FGSM", own]) == (SUITES["quick"][0], own)
    assert suite(["quick", "Square"])[-1].name == "Square"


@pytest.mark.parametrize(
    ("wrong", "message"), [(["PGDD"], "unknown attack"), ([], "no attack"), (["FGSM"] * 2, "FGSM")]
)
def test_refuses_lists_that_mean_nothing(wrong: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        suite(wrong)


def test_says_what_to_install_without_torchattacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchattacks", None)
    with pytest.raises(ImportError, match=r"pip install 'snntorch-lr\[attacks\]'"):
        suite("paper")
    assert suite("quick")
