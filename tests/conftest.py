"""What all tests share: one thread, a fixed seed, no network."""

import os
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("SMOLLM_DIFFUSION_CACHE", "")  # tests leave nothing behind
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Record files that tests write are cached by their content; the processes of a run share one folder.
if "HF_DATASETS_CACHE" not in os.environ:
    _records = tempfile.TemporaryDirectory(prefix="records_")
    os.environ["HF_DATASETS_CACHE"] = _records.name

import pytest
import torch


@pytest.fixture(autouse=True)
def deterministic() -> None:
    """Every test starts from the same state, whatever ran before it."""
    # Tiny tensors gain nothing from threads, and on a busy machine threads spend their time waiting for each other.
    torch.set_num_threads(1)
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip GPU tests where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
