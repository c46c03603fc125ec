"""What a model is on the Hub, and its way there: staged in a folder, checked in a fresh process, pushed in one commit.

`release.py` is the command over it; `train_hf.py --push_to_hub` uploads what it has trained by `release`.
"""

import json
import logging
import os
import posixpath
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCardData, constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils.sha import git_hash, sha_fileobj
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.dynamic_module_utils import get_relative_import_files

from eval.card import with_base_model
from repo_package import ROOT, load_repo_module

logger = logging.getLogger(__name__)

README, LICENSE, CONFIG = "README.md", "LICENSE", "config.json"
WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER = ("adapter/adapter_config.json", "adapter/adapter_model.safetensors")
BESIDE_WEIGHTS = ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
"""What every model of ours is saved with."""
DOCUMENTS = (".md",)
PICTURES = (".png", ".gif", ".svg", ".webp", ".jpg")
MADE_BY_THE_HUB = (".gitattributes",)
OF_A_MODEL = (".json", ".jinja", ".py", ".safetensors", ".bin", ".pt", ".pkl")
"""What an older upload of a model may have left in a repo, even beside a card that is somebody's own."""

_COMMIT = re.compile(r"[0-9a-f]{40}")
_NO_LINKS = re.compile(r"\A---\n.*?^---$|^```.*?^```|`[^`\n]*`", re.MULTILINE | re.DOTALL)
"""Metadata and code, in which what looks like a link is none."""
_LINK = re.compile(r'(!?)\[([^\[\]]*)\]\(([^()\s]+)\)|\b(?:src|srcset|href)="([^"]+)"')
_ELSEWHERE = re.compile(r"[a-z][a-z0-9+.-]*:|#|//")
_HTTP_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]
"""`HTTPError` of the client that huggingface_hub uses, which another release of it may replace; no network is one."""


class ReleaseError(ValueError):
    """A release cannot be made or pushed; the message says why and what to do."""


@dataclass(frozen=True)
class Base:
    """The base that a head-only release is loaded onto.

    Args:
        repo: its id.
        revision: commit of it.
    """

    repo: str
    revision: str


@dataclass(frozen=True)
class Pushed:
    """What a push has done.

    Args:
        commit: id of the commit that holds the release.
        changed, removed: files of the repo that it wrote and took away; both empty where all was there already.
        url: page of the release.
    """

    commit: str
    changed: tuple[str, ...]
    removed: tuple[str, ...]
    url: str


# ---------------------------------------------------------------------------------------------------------------------
# What belongs to it
# ---------------------------------------------------------------------------------------------------------------------


def check_complete(folder: Path) -> None:
    """See that a folder can be loaded on another machine.

    Args:
        folder: what `save_pretrained` wrote.

    Raises:
        FileNotFoundError: it holds no weights, or not the code that its config names.
        ValueError: the weights are those of a head alone, on a base that is a folder of this machine.
    """
    if not any(folder.glob("*.safetensors")) or not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"{folder} holds no {CONFIG} with *.safetensors, so there is nothing to release.")
    config = read_config(folder)
    missing = [name for name in entry_modules(config) if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{folder} lacks {', '.join(missing)}, which its {CONFIG} names: save it again.")
    base = config.get("base_model_name_or_path")
    if config.get("head_only_checkpoint") and Path(str(base)).exists():
        raise ValueError(
            f"{folder} holds a head alone, and its base {base} is a folder of this machine, which nobody else can "
            "load: train with the base's repo as --base, or without --head_only."
        )


def read_config(folder: Path) -> dict[str, Any]:
    """The fields of a folder's config.json."""
    config: dict[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    return config


def entry_modules(config: Mapping[str, Any]) -> list[str]:
    """The modules that a config sends `trust_remote_code` to; none for a plain base."""
    return sorted({f"{name.partition('.')[0]}.py" for name in config.get("auto_map", {}).values()})


def code_files(folder: Path) -> list[str]:
    """The modules that loading needs: those of the config and what they import, found as transformers finds it."""
    entries = entry_modules(read_config(folder))
    imported = {Path(path).name for name in entries for path in get_relative_import_files(folder / name)}
    return sorted({*entries, *imported})


def weight_files(folder: Path) -> list[str]:
    """The files of a folder's weights, with their index where there are several."""
    if not (folder / WEIGHTS_INDEX).is_file():
        return [WEIGHTS]
    index = json.loads((folder / WEIGHTS_INDEX).read_text(encoding="utf-8"))
    return [WEIGHTS_INDEX, *sorted(set(index["weight_map"].values()))]


# ---------------------------------------------------------------------------------------------------------------------
# Staging
# ---------------------------------------------------------------------------------------------------------------------


def stage(source: Path, target: Path, base: Base | None = None) -> list[str]:
    """Write a complete Hub repo.

    Args:
        source: folder of the model, which may hold other files too.
        target: empty folder.
        base: leave the base's weights out, and let the config name it; None = release the weights as they are.

    Returns:
        The names of the files.

    Raises:
        FileNotFoundError: the source lacks a file.
        ValueError: as in `check_complete`, or a picture of the card is missing.
    """
    check_complete(source)
    config = read_config(source)
    names = [*code_files(source), *BESIDE_WEIGHTS, *(ADAPTER if config.get("draft_adapter") else ())]
    names += [CONFIG, *weight_files(source)] if base is None else []
    missing = [name for name in names if not (source / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{source} lacks {', '.join(missing)}, so it is no complete model: save it again.")
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target / name)
    if base is not None:
        write_head(source, target, base)
    stage_card(source, target, base)
    # The code is under the repository's licence, whatever the weights are under.
    shutil.copyfile((source if (source / LICENSE).is_file() else ROOT) / LICENSE, target / LICENSE)
    return files_of(target)


def files_of(folder: Path) -> list[str]:
    """Names of all files in a folder."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def write_head(source: Path, target: Path, base: Base) -> None:
    """Write the head's weights alone, and a config that says where the base is."""
    prefixes = load_repo_module("modeling_smollm_diffusion").HEAD_PREFIXES
    tensors: dict[str, Tensor] = {}
    for name in weight_files(source):
        if name != WEIGHTS_INDEX:
            with safe_open(source / name, framework="pt") as file:
                tensors |= {key: file.get_tensor(key) for key in file.keys() if key.startswith(prefixes)}  # noqa: SIM118
    save_file(tensors, target / WEIGHTS, metadata={"format": "pt"})
    config = read_config(source)
    config.pop("quantization_config", None)  # how the base is quantised is for the next load to say
    config |= {"head_only_checkpoint": True, "base_model_name_or_path": base.repo, "base_revision": base.revision}
    (target / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def pinned_base(source: Path, repo: str | None, revision: str | None) -> Base:
    """The base of a head-only release, at one commit.

    Args:
        source: folder of the model.
        repo, revision: what to use in place of what its config says; a branch or tag becomes the commit that it is now.

    Raises:
        ReleaseError: the base or its revision is not known, or the Hub does not have it.
    """
    config = read_config(source)
    repo = repo or config.get("base_model_name_or_path")
    revision = revision or config.get("base_revision")
    if repo is None or Path(repo).exists():
        raise ReleaseError(
            f"The config of {source} names no repo of its base, so a head alone could not be loaded: release the base "
            "first, then name it with --base_model and --base_revision, or leave out --head_only."
        )
    if revision is None:
        raise ReleaseError(
            f"The config of {source} does not say at which revision its base {repo} is: name the commit that the head "
            "was trained on with --base_revision. (A base that moves on would change what the model says.)"
        )
    if _COMMIT.fullmatch(revision) is None:
        with explained(f"{repo} at {revision}"):
            revision = str(HfApi().model_info(repo, revision=revision).sha)
    return Base(repo, revision)


# ---------------------------------------------------------------------------------------------------------------------
# The card
# ---------------------------------------------------------------------------------------------------------------------


def stage_card(source: Path, target: Path, base: Base | None) -> None:
    """Write the card and what it shows and links to; of links to anything else only their text stays."""
    if not (source / README).is_file():
        text = plain_card(read_config(source), source.resolve().name)
        (target / README).write_text(text, encoding="utf-8")
    else:
        waiting, done = [README], set[str]()
        while waiting:
            name = waiting.pop()
            done.add(name)
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            if not name.endswith(DOCUMENTS):
                shutil.copyfile(source / name, target / name)
                continue
            text, linked = with_released_links((source / name).read_text(encoding="utf-8"), name, source)
            (target / name).write_text(text, encoding="utf-8")
            waiting += linked - done - set(waiting)
    if base is not None:
        text = (target / README).read_text(encoding="utf-8")
        (target / README).write_text(with_base_model(text, base.repo), encoding="utf-8")


def with_released_links(text: str, name: str, source: Path) -> tuple[str, set[str]]:
    """A document whose relative links all lead to what is released with it.

    Args:
        text: Markdown.
        name: of the document within the source.
        source: folder that its links are relative to.

    Returns:
        The text, links to other files made plain text; and the documents and pictures that it links to.

    Raises:
        FileNotFoundError: a picture is missing.
    """
    linked: set[str] = set()

    def checked(found: re.Match[str]) -> str:
        shown, label, target = found[1], found[2], found[3] or found[4]
        if _ELSEWHERE.match(target):
            return found[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(name), target.partition("#")[0]))
        exists = not path.startswith(("../", "/")) and (source / path).is_file()
        if exists and path.endswith((*DOCUMENTS, *PICTURES)):
            linked.add(path)
            return found[0]
        if shown or label is None or path.endswith(PICTURES):
            raise FileNotFoundError(f"{source / name} shows {target}, which is not there: make it, or leave it out.")
        return label

    parts, end = [], 0
    for code in _NO_LINKS.finditer(text):
        parts += [_LINK.sub(checked, text[end : code.start()]), code[0]]
        end = code.end()
    return "".join([*parts, _LINK.sub(checked, text[end:])]), linked


def plain_card(config: Mapping[str, Any], name: str) -> str:
    """A card for a model that has none; says no more than is known.

    Args:
        config: of the model.
        name: of the model.
    """
    repo, has_head = config.get("base_model_name_or_path"), bool(entry_modules(config))
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["function-calling", "tool-use", "diffusion", "constrained-decoding", "custom_code"] if has_head else None,
        base_model=repo,
        base_model_relation=None if repo is None else "adapter" if config.get("head_only_checkpoint") else "finetune",
    )
    kind = "A causal language model with a schema diffusion head for tool calls" if has_head else "A language model"
    use = "\nreply = model.respond(messages, tools=tools, tokenizer=tokenizer)" if has_head else ""
    return f"""---
{data.to_yaml()}
---

# {name}

{kind}. This card was written at its release, since there was none: say here what the model is for, what it was trained
on and how good it is.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(repo, trust_remote_code=False)
model = AutoModelForCausalLM.from_pretrained(repo, trust_remote_code={has_head}){use}
```
"""


# ---------------------------------------------------------------------------------------------------------------------
# The check
# ---------------------------------------------------------------------------------------------------------------------


def check_release(folder: Path, weights: Path) -> list[str]:
    """See that a staged release holds what it must and nothing else, and that a fresh process can use it.

    A release with its base is loaded without network; the base of a head alone comes from the Hub, or its cache.

    Args:
        folder: the release.
        weights: folder of the model that was staged; what is loaded must have its weights.

    Returns:
        What was checked, one sentence each.

    Raises:
        ReleaseError: what is wrong.
    """
    config, names = read_config(folder), files_of(folder)
    expected = {*code_files(folder), *BESIDE_WEIGHTS, *weight_files(folder), *ADAPTER, CONFIG, README, LICENSE}
    strange = [name for name in names if name not in expected and not name.endswith((*DOCUMENTS, *PICTURES))]
    if strange:
        raise ReleaseError(f"{folder} holds {', '.join(strange)}, which no release holds: remove it.")
    modules = sum(name.endswith(".py") for name in names)
    files = f"files: {len(names)}, {modules} of them modules that loading needs; no pickle, no dead link"
    with tempfile.TemporaryDirectory(prefix="release_") as place:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        environment["HF_MODULES_CACHE"] = place
        if not config.get("head_only_checkpoint"):
            environment["HF_HUB_OFFLINE"] = "1"
        script = Path(__file__).with_name("load_check.py")
        shards = [str((weights / name).resolve()) for name in weight_files(weights) if name != WEIGHTS_INDEX]
        command = [sys.executable, "-P", str(script), str(folder.resolve()), *shards]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=place, check=False)
    try:
        result = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        result = {"error": f"the process ended with status {done.returncode}: {done.stderr.strip()[-500:]}"}
    if "error" in result:
        raise ReleaseError(f"The release does not work in a fresh process, so nothing was pushed: {result['error']}")
    return [files, *result["checks"]]


# ---------------------------------------------------------------------------------------------------------------------
# The push
# ---------------------------------------------------------------------------------------------------------------------


def push(
    folder: Path,
    repo_id: str,
    *,
    tag: str | None = None,
    private: bool = False,
    keep_card: bool = False,
    api: HfApi | None = None,
) -> Pushed:
    """Let a repo hold a release and nothing else: one commit, then the tag. The same call again finishes a broken one.

    Args:
        folder: the release.
        repo_id: "owner/name"; created where it does not exist.
        tag: name for the commit.
        private: create a private repo.
        keep_card: leave the repo's README.md alone if it has one, and with it all files that are not a model's.
        api: client of the Hub; None = as the environment says.

    Returns:
        What was done.

    Raises:
        ReleaseError: the Hub refuses or cannot be reached, the tag is another release's, or the repo is public where
            a private one was asked for.
    """
    api = api or HfApi()
    with explained(repo_id):
        repo_id = api.create_repo(repo_id, private=private or None, exist_ok=True).repo_id
        info = api.model_info(repo_id)
        if private and not info.private:
            raise ReleaseError(f"{repo_id} exists and is public: make it private in its settings, or use another name.")
        tags = {ref.name: ref.target_commit for ref in api.list_repo_refs(repo_id).tags} if tag else {}
        commit = tags.get(str(tag), str(info.sha))
        changed, removed = differences(api, folder, repo_id, commit, keep_card)
        if tag in tags and (changed or removed):
            raise ReleaseError(
                f"The tag {tag} of {repo_id} is another release ({_listed([*changed, *removed])} differ): choose a new "
                "one, or delete it on the Hub first."
            )
        if changed or removed:
            commit = commit_files(api, folder, repo_id, changed, removed, str(tag or ""), parent=commit)
        if tag and tag not in tags:
            api.create_tag(repo_id, tag=tag, revision=commit)
    return Pushed(commit, tuple(changed), tuple(removed), f"{api.endpoint}/{repo_id}/tree/{tag or commit}")


def commit_files(
    api: HfApi, folder: Path, repo_id: str, changed: list[str], removed: list[str], tag: str, parent: str
) -> str:
    """Write and remove files of a repo in one commit on top of `parent`; returns its id.

    Not `upload_folder`, which makes several commits where it uploads through Xet.
    """
    additions = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=folder / name) for name in changed]
    deletions = [CommitOperationDelete(path_in_repo=name) for name in removed]
    commit = api.create_commit(
        repo_id, [*additions, *deletions], commit_message=f"Release {tag}".strip(), parent_commit=parent
    )
    return str(commit.oid)


def differences(api: HfApi, folder: Path, repo_id: str, revision: str, keep_card: bool) -> tuple[list[str], list[str]]:
    """What a release would change in a revision of a repo: files that differ or are new, and files to remove."""
    tree = api.list_repo_tree(repo_id, recursive=True, revision=revision)
    there = {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}
    kept = keep_card and README in there
    ours, theirs = (
        [name for name in sorted(names) if not kept or name.endswith(OF_A_MODEL)] for names in (files_of(folder), there)
    )
    changed = [name for name in ours if name not in there or not is_same(folder / name, there[name])]
    return changed, [name for name in theirs if name not in ours and name not in MADE_BY_THE_HUB]


def is_same(path: Path, there: RepoFile) -> bool:
    """Whether a file is what the Hub has, by the hash that it knows it by."""
    if path.stat().st_size != there.size:
        return False
    if there.lfs is None:
        return git_hash(path.read_bytes()) == there.blob_id
    with path.open("rb") as file:
        return sha_fileobj(file).hex() == there.lfs.sha256


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Turn what goes wrong between us and the Hub into one sentence.

    Args:
        what: the repo it is about.
    """
    again = "Run the same command again: it goes on where it was."
    try:
        yield
    except HFValidationError as error:
        raise ReleaseError(
            f"{what!r} is no repo id: it is like owner/name. ({' '.join(str(error).split())})"
        ) from error
    except OfflineModeIsEnabled as error:
        raise ReleaseError("HF_HUB_OFFLINE is set, so the Hub is not asked: unset it to push.") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        said = " ".join(str(error.server_message or "").split())
        if status == 401:
            reason = "The Hub knows no token of yours: run `hf auth login`, or set HF_TOKEN to one that may write."
        elif status == 403:
            reason = f"Your token may not do that to {what}: use one with the right to write, or a repo of your own."
        elif isinstance(error, RepositoryNotFoundError) or status == 404:
            reason = f"The Hub has no {what}, or does not show it to you: check the name and your token."
        elif status == 412:
            reason = f"Somebody else changed {what} meanwhile, so nothing was written. Run the same command again."
        else:
            reason = f"The Hub answered {status}. {again}"
        raise ReleaseError(f"{reason} (It says: {said})" if said else reason) from error
    except (_HTTP_ERROR, RuntimeError) as error:  # RuntimeError: the upload of a large file
        cause = error.__cause__ or error
        raise ReleaseError(f"The Hub at {constants.ENDPOINT} cannot be reached ({cause}). {again}") from error


def release(folder: Path, repo_id: str) -> str:
    """Release a trained model in one go; the card that the repo has stays.

    Args:
        folder: what `save_pretrained` wrote, of model and tokenizer.
        repo_id: "owner/name"; created where it does not exist.

    Returns:
        Address of the release.

    Raises:
        FileNotFoundError, ValueError: as in `stage`, `check_release` and `push`.
    """
    with tempfile.TemporaryDirectory(prefix="release_") as place:
        stage(folder, Path(place))
        for checked in check_release(Path(place), folder):
            logger.info("checked %s", checked)
        pushed = push(Path(place), repo_id, keep_card=True)
    logger.info("released %s to %s", folder, pushed.url)
    return pushed.url
