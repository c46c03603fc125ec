"""Releases a model on the Hugging Face Hub: `python release.py --repo_id owner/name [--revision v1.0]`.

Writes a complete Hub repo (code, config, weights, tokenizer, templates, card) into a folder, loads that in a fresh
process and lets it answer, and only then pushes it: one commit, then the tag. The same command again finishes what was
interrupted, and changes nothing where nothing has changed. docs/release.md says more.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from repo_package import ROOT
from training.release import Pushed, ReleaseError, check_release, files_of, pinned_base, push, stage


def command_line() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(
        prog="release.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--repo_id", help="owner/name on the Hub; created where it does not exist")
    parser.add_argument("--model", type=Path, default=ROOT, help="folder of the model (default: this repository)")
    parser.add_argument("--revision", metavar="TAG", help="tag for the commit, such as v1.0")
    parser.add_argument("--private", action="store_true", help="create a private repo")
    parser.add_argument("--head_only", action="store_true", help="leave the base's weights out; loading fetches them")
    parser.add_argument("--base_model", metavar="REPO", help="of --head_only: the base (default: what the config says)")
    parser.add_argument("--base_revision", metavar="COMMIT", help="of --head_only: its commit, or a branch or tag")
    parser.add_argument("--folder", type=Path, help="write the release there and do not push it")
    return parser


def run(arguments: list[str]) -> None:
    """Stage, check and push.

    Raises:
        ValueError, OSError: an option is wrong, the model is not complete, or the Hub refuses.
    """
    options = command_line().parse_args(arguments)
    if (options.repo_id is None) == (options.folder is None):
        raise ReleaseError("Give either --repo_id, to push a release, or --folder, to write one and look at it.")
    if options.folder is not None and (options.revision or options.private):
        raise ReleaseError("--revision and --private are for a release that is pushed: leave them out with --folder.")
    if not options.head_only and (options.base_model or options.base_revision):
        raise ReleaseError("--base_model and --base_revision go with --head_only.")
    if not options.model.is_dir():
        raise ReleaseError(f"--model {options.model} is no folder.")
    base = pinned_base(options.model, options.base_model, options.base_revision) if options.head_only else None
    with tempfile.TemporaryDirectory(prefix="release_") as place:
        folder = options.folder or Path(place)
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise ReleaseError(f"--folder {folder} is not empty: name a new one.")
        stage(options.model, folder, base)
        size = sum((folder / name).stat().st_size for name in files_of(folder)) / 1e6
        print(f"staged {len(files_of(folder))} files, {size:.1f} MB", flush=True)
        for checked in check_release(folder, options.model):
            print(f"checked {checked}", flush=True)
        if options.folder is not None:
            print(f"written to {folder}")
        else:
            pushed = push(folder, options.repo_id, tag=options.revision, private=options.private)
            report(pushed, options.repo_id, options.revision)


def report(pushed: Pushed, repo_id: str, tag: str | None) -> None:
    """Say what a push has done."""
    if pushed.changed or pushed.removed:
        counts = f"{len(pushed.changed)} files written, {len(pushed.removed)} removed"
        print(f"pushed {repo_id}: commit {pushed.commit[:12]}, {counts}")
    else:
        print(f"nothing to push: {repo_id} holds exactly this at commit {pushed.commit[:12]}")
    if tag is not None:
        print(f"tagged {tag}")
    print(pushed.url)


def main(arguments: list[str]) -> None:
    """Run the command.

    Raises:
        SystemExit: it failed, and the message says why in one line.
    """
    try:
        run(arguments)
    except KeyboardInterrupt:
        raise SystemExit("Interrupted: run the same command again, it goes on where it was.") from None
    except (ValueError, OSError) as error:
        raise SystemExit(f"release.py: {' '.join(str(error).split())}") from error


if __name__ == "__main__":
    main(sys.argv[1:])
