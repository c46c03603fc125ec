"""The report of known vulnerabilities says what was found, and never more than was looked up."""

import runpy

from repo_package import ROOT

summary = runpy.run_path(str(ROOT / ".ci" / "dependency_audit.py"))["summary"]
CLEAN = {"name": "good", "version": "1.0", "vulns": []}
FAULTY = {"name": "bad", "version": "2.0", "vulns": [{"id": "CVE-1", "fix_versions": ["2.1", "3.0"]}]}
UNKNOWN = {"name": "unknown", "version": "3.0", "skip_reason": "not found"}


def test_a_vulnerability_is_named_with_the_release_that_mends_it() -> None:
    assert summary([CLEAN, FAULTY, UNKNOWN]) == [
        "dependency audit: 2 of 3 packages could be looked up",
        "  bad 2.0: CVE-1, mended in 2.1, 3.0",
    ]


def test_no_finding_is_claimed_only_for_what_was_looked_up() -> None:
    assert summary([CLEAN, UNKNOWN])[1] == "  no known vulnerability among them"
    assert summary([UNKNOWN])[1] == "  the advisories of the Python Package Index were not within reach"
