"""What pip-audit knows of the installed packages, in a few lines: `python .ci/dependency_audit.py`.

A report, not a gate: it always ends with status 0.
"""

import json
import subprocess
import sys
from typing import Any


def summary(dependencies: list[dict[str, Any]]) -> list[str]:
    """The lines of the report.

    Args:
        dependencies: of `pip-audit --format json`: name, version, and `vulns` or `skip_reason`.
    """
    audited = [one for one in dependencies if "skip_reason" not in one]
    lines = [f"dependency audit: {len(audited)} of {len(dependencies)} packages could be looked up"]
    for one in audited:
        for fault in one["vulns"]:
            fixed = ", ".join(fault["fix_versions"]) or "no release yet"
            lines.append(f"  {one['name']} {one['version']}: {fault['id']}, mended in {fixed}")
    if not audited:
        lines.append("  the advisories of the Python Package Index were not within reach")
    elif not any(one["vulns"] for one in audited):
        lines.append("  no known vulnerability among them")
    return lines


def main() -> None:
    """Print the report."""
    command = [sys.executable, "-m", "pip_audit", "--skip-editable", "--progress-spinner", "off", "--format", "json"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        print("\n".join(summary(json.loads(done.stdout)["dependencies"])))
    except (subprocess.TimeoutExpired, ValueError):
        print("dependency audit: the advisory service did not answer")


if __name__ == "__main__":
    main()
