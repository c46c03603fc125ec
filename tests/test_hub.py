"""Loading over the Hub's protocol in fresh processes: tags, older revisions, code of another revision, a head whose
base is another repo, and all of it again without network; nothing else is ever asked for.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi, constants
from safetensors.torch import load_file

from loopback_hub import TOKEN, LoopbackHub, serving
from release_models import CODE, answering_model, saved_model
from tiny_tokenizer import tiny_tokenizer
from training.release import Base, push, stage

REPO, BASE, HEAD = "org/model", "org/base", "org/head"
OTHER_CODE = "\nRELEASED_AS = 'v2'\n"

# Loads everything that it is told to and says what it got. Connections to other machines end the process.
LOAD = """
import json, os, sys
from pathlib import Path

def only_this_machine(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo"):
        address = arguments[1] if event == "socket.connect" else arguments
        if address[0] not in ("127.0.0.1", b"127.0.0.1", "::1", "localhost", b"localhost"):
            print(f"a connection to {address}", file=sys.stderr, flush=True)
            os._exit(3)

sys.addaudithook(only_this_machine)
from huggingface_hub import snapshot_download
from transformers import AutoModelForCausalLM, AutoTokenizer

def based(base, **options):
    fresh = kind.from_base(base, head_hidden_size=32, head_num_layers=1, head_num_heads=2, **options)
    return float(fresh.get_input_embeddings().weight.detach().double().sum())

def loaded(repo, **revisions):
    global kind
    tokenizer = AutoTokenizer.from_pretrained(repo, trust_remote_code=False, revision=revisions.get("revision", "main"))
    model = AutoModelForCausalLM.from_pretrained(repo, trust_remote_code=True, **revisions)
    tool = {"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
    reply = model.respond([{"role": "user", "content": "Weather?"}], tools=[tool], tokenizer=tokenizer,
                          tool_choice="required", max_tool_calls=1)
    kind = type(model)
    module = kind.__module__
    return {
        "base": float(model.get_input_embeddings().weight.detach().double().sum()),
        "head": sum(float(p.detach().double().sum()) for p in model.diffusion_head.parameters()),
        "code": getattr(sys.modules[module], "RELEASED_AS", "v1"),
        "commit": module.split(".")[-2],
        "call": reply.message["tool_calls"][0]["function"]["name"],
    }

wanted, base, place = json.loads(sys.argv[1]), *sys.argv[2:]
results = {name: loaded(*arguments, **revisions) for name, (arguments, revisions) in wanted.items()}
if not os.path.isdir(place):
    snapshot_download("org/model", revision="v1", local_dir=place)
results["snapshot"] = loaded(place)
results["fresh head"] = {"base": based("org/base", revision=base), "call": "get_weather"}
print(json.dumps(results))
"""


@dataclass(frozen=True)
class Loaded:
    """What fresh processes loaded, online and then with the Hub gone; what they asked for; and where it came from."""

    online: dict[str, dict[str, Any]]
    offline: dict[str, dict[str, Any]]
    requests: list[str]
    hub: LoopbackHub
    sums: dict[str, dict[str, float]]
    snapshot: Path


def load(endpoint: str, home: Path, wanted: dict[str, Any], base: str, offline: bool) -> dict[str, dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"}
    environment |= {"HF_HUB_OFFLINE": "1"} if offline else {}
    command = [sys.executable, "-c", LOAD, json.dumps(wanted), base, str(home / "snapshot")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, env=environment, cwd=home)
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return result


def sums_of(model: Path) -> dict[str, float]:
    """What LOAD says of the weights in a folder."""
    tensors = {key: tensor.double() for key, tensor in load_file(model / "model.safetensors").items()}
    head = sum(float(tensor.sum()) for key, tensor in tensors.items() if key.startswith("diffusion_head."))
    return {"base": float(tensors["base.model.embed_tokens.weight"].sum()), "head": head}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    """Release two versions, and the head of the first on a base that moves on; load them, then again offline."""
    place = tmp_path_factory.mktemp("hub")
    hub = LoopbackHub()
    with serving(hub) as endpoint, pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        api = HfApi(endpoint=endpoint, token=TOKEN)
        for version, seed in (("v1", 0), ("v2", 1)):
            saved_model(place / version, seed)
        code = place / "v2" / "modeling_smollm_diffusion.py"
        code.write_text(code.read_text() + OTHER_CODE)
        for version in ("v1", "v2"):
            (place / f"release-{version}").mkdir()
            stage(place / version, place / f"release-{version}")
            push(place / f"release-{version}", REPO, tag=version, api=api)

        base_of = {seed: answering_model(seed).base for seed in (0, 1)}
        for seed in (0, 1):  # the base moves on behind the commit that the head is for
            base_of[seed].save_pretrained(place / f"base-{seed}")
            tiny_tokenizer().save_pretrained(place / f"base-{seed}")
            hub.serve_folder(BASE, place / f"base-{seed}")
        base = hub.repos[BASE].commits[0][0]
        (place / "release-head").mkdir()
        stage(place / "v1", place / "release-head", Base(BASE, base))
        push(place / "release-head", HEAD, api=api)

        first, second = (hub.repos[REPO].tags[version] for version in ("v1", "v2"))
        wanted = {
            "main": ((REPO,), {}),
            "tag": ((REPO,), {"revision": "v1"}),
            "older commit": ((REPO,), {"revision": first}),
            "newer code": ((REPO,), {"revision": "v1", "code_revision": second}),
            "head": ((HEAD,), {}),
        }
        (place / "home").mkdir()
        hub.requests.clear()
        online = load(endpoint, place / "home", wanted, base, offline=False)
        requests = list(hub.requests)
    again = {name: wanted[name] for name in ("main", "newer code", "head")}
    offline = load(endpoint, place / "home", again, base, offline=True)
    sums = {version: sums_of(place / version) for version in ("v1", "v2")}
    return Loaded(online, offline, requests, hub, sums, place / "home" / "snapshot")


def weights(result: dict[str, Any]) -> Any:
    return pytest.approx({name: result[name] for name in ("base", "head")}, rel=1e-6)


def test_main_is_the_newest_release_and_a_tag_stays_what_it_was(loaded: Loaded) -> None:
    tags = loaded.hub.repos[REPO].tags
    assert loaded.sums["v2"] == weights(loaded.online["main"])
    assert (loaded.online["main"]["code"], loaded.online["main"]["commit"]) == ("v2", tags["v2"])
    assert loaded.sums["v1"] == weights(loaded.online["tag"])
    assert (loaded.online["tag"]["code"], loaded.online["tag"]["commit"]) == ("v1", tags["v1"])
    assert loaded.sums["v1"]["base"] != pytest.approx(loaded.sums["v2"]["base"])


def test_a_commit_still_loads_its_own_weights(loaded: Loaded) -> None:
    assert loaded.online["older commit"] == loaded.online["tag"]


def test_the_code_can_be_of_another_revision_than_the_weights(loaded: Loaded) -> None:
    result = loaded.online["newer code"]
    assert loaded.sums["v1"] == weights(result)
    assert (result["code"], result["commit"]) == ("v2", loaded.hub.repos[REPO].tags["v2"])


def test_a_head_gets_its_base_from_the_pinned_commit(loaded: Loaded) -> None:
    assert len(loaded.hub.repos[BASE].commits) == 2
    assert loaded.sums["v1"] == weights(loaded.online["head"])
    sizes = {repo: len(loaded.hub.repos[repo].tree()["model.safetensors"]) for repo in (REPO, BASE, HEAD)}
    assert sizes[HEAD] < sizes[REPO]
    assert sizes[HEAD] + sizes[BASE] == pytest.approx(sizes[REPO], rel=0.05)


def test_a_fresh_head_can_be_put_on_a_commit_of_a_base(loaded: Loaded) -> None:
    assert loaded.online["fresh head"]["base"] == pytest.approx(loaded.sums["v1"]["base"])


def test_all_of_it_loads_again_from_the_cache_without_network(loaded: Loaded) -> None:
    assert loaded.offline.keys() >= {"main", "newer code", "head"}
    assert loaded.offline == {name: loaded.online[name] for name in loaded.offline}


def test_a_downloaded_snapshot_loads_with_the_hub_gone(loaded: Loaded) -> None:
    assert loaded.sums["v1"] == weights(loaded.offline["snapshot"])
    names = {path.name for path in loaded.snapshot.iterdir() if path.name != ".cache"}
    assert names == set(loaded.hub.repos[REPO].tree("v1"))


def test_every_load_can_call(loaded: Loaded) -> None:
    assert {result["call"] for result in (*loaded.online.values(), *loaded.offline.values())} == {"get_weather"}


def test_loading_asks_for_nothing_but_files_of_the_repos(loaded: Loaded) -> None:
    of_the_repos = tuple(f"{prefix}{repo}/" for repo in (REPO, BASE, HEAD) for prefix in ("", "api/models/"))
    others = {path for path in loaded.requests if not f"{path}/".startswith((*of_the_repos, "lfs/"))}
    # huggingface_hub itself asks the Hub for this once a day, to say in its user agent who runs it.
    assert others <= {"api/agent-harnesses"}
    assert not [path for path in loaded.requests if path.endswith((".bin", ".pkl", ".pt", ".pth"))]
    tried = {path.rpartition("/")[2] for path in loaded.requests if path.endswith(".py")}
    assert tried >= CODE


def test_no_repo_holds_a_pickle(loaded: Loaded) -> None:
    files = {name for repo in (REPO, HEAD) for _, tree in loaded.hub.repos[repo].commits for name in tree}
    assert {Path(name).suffix for name in files} == {"", ".json", ".jinja", ".md", ".py", ".safetensors"}
