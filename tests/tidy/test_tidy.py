"""The repository keeps the tidy rules."""

import pytest

from tests.tidy.modules import dead_modules, missing_packages
from tests.tidy.rules import RULES, Rule
from tests.tidy.source import Finding, Source, sources


@pytest.fixture(scope="module")
def files() -> list[Source]:
    return list(sources())


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_files_keep(rule: Rule, files: list[Source]) -> None:
    _expect_none([finding for source in files for finding in rule(source)], rule.__doc__)


def test_every_folder_is_a_package(files: list[Source]) -> None:
    _expect_none(list(missing_packages(files)), missing_packages.__doc__)


def test_every_module_has_a_user(files: list[Source]) -> None:
    _expect_none(list(dead_modules(files)), dead_modules.__doc__)


def _expect_none(findings: list[Finding], rule: str | None) -> None:
    if findings:
        pytest.fail("\n".join([rule or "", *map(str, findings)]), pytrace=False)
