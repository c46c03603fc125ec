"""Fetches the source distribution of exactly the installed transformers and unpacks its tests into `vendor/`.

Takes nothing; leaves `vendor/transformers-<version>/tests`, which git ignores. It installs nothing and runs no test.
"""

import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import transformers

VENDOR = Path(__file__).resolve().parents[2] / "vendor"


def fetched_tests() -> Path:
    """Where the tests of the installed version lie, fetched or not."""
    return VENDOR / f"transformers-{transformers.__version__}" / "tests"


def fetch() -> Path:
    """Download and unpack, unless that was done before.

    Returns:
        The folder of the tests.

    Raises:
        subprocess.CalledProcessError: pip could not download the source distribution.
    """
    target = fetched_tests()
    if target.exists():
        return target
    requirement = f"transformers=={transformers.__version__}"
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
        subprocess.run([*pip, "--dest", folder, requirement], check=True)
        (archive,) = Path(folder).glob("transformers-*.tar.gz")
        with tarfile.open(archive) as source:
            members = [member for member in source if "/tests/" in member.name]
            source.extractall(VENDOR, members=members, filter="data")
    return target


if __name__ == "__main__":
    print(fetch())
