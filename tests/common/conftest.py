"""Declares the markers of transformers' own tests."""

import pytest

MARKERS = (
    "accelerate_tests",
    "flash_attn_test",
    "flash_attn_3_test",
    "flash_attn_4_test",
    "generate",
    "torch_compile_test",
    "torch_export_test",
)


def pytest_configure(config: pytest.Config) -> None:
    """Register them, as unknown markers are errors here."""
    for marker in MARKERS:
        config.addinivalue_line("markers", f"{marker}: see transformers")
