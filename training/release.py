"""Upload of a trained model to the Hub without touching the model card that is there.

`Trainer.push_to_hub` writes a generated README.md over the repository's; a release uploads the folder instead.
"""

import json
import logging
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

logger = logging.getLogger(__name__)

README = "README.md"
RELEASED = ["*.json", "*.jinja", "*.py", "*.safetensors", "*.txt", README]
"""What a model is loaded from; pickles are not among it."""
TRAINING_STATE = ["checkpoint-*/*", "trainer_state.json"]


def release(folder: Path, repo_id: str) -> str:
    """Upload a saved model in one commit.

    Args:
        folder: what `save_pretrained` wrote.
        repo_id: "owner/name"; created where it does not exist.

    Returns:
        Address of the commit.

    Raises:
        FileNotFoundError: the folder holds no weights, or not the code that its config names.
        ValueError: the weights are those of a head alone, on a base that is a folder of this machine.
    """
    check_complete(folder)
    api = HfApi()
    api.create_repo(repo_id, exist_ok=True)
    has_card = api.file_exists(repo_id, README)
    commit = api.upload_folder(
        folder_path=folder,
        repo_id=repo_id,
        allow_patterns=RELEASED,
        ignore_patterns=[*TRAINING_STATE, *([README] if has_card else [])],
        commit_message="Release trained weights",
    )
    logger.info("released %s to %s", folder, repo_id)
    return str(commit.commit_url)


def check_complete(folder: Path) -> None:
    """See that a folder can be loaded on another machine.

    Raises:
        FileNotFoundError, ValueError: as in `release`.
    """
    if not any(folder.glob("*.safetensors")) or not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no config.json with *.safetensors, so there is nothing to release.")
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    code = sorted({f"{name.partition('.')[0]}.py" for name in config.get("auto_map", {}).values()})
    missing = [name for name in code if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{folder} lacks {', '.join(missing)}, which its config.json names: save it again.")
    base = config.get("base_model_name_or_path")
    if config.get("head_only_checkpoint") and Path(str(base)).exists():
        raise ValueError(
            f"{folder} holds a head alone, and its base {base} is a folder of this machine, which nobody else can "
            "load: train with the base's repo as --base, or without --head_only."
        )
