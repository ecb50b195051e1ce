"""``agent.push_to_hub``: what it sends to a hub, which is a small server here that speaks the real one's protocol."""

import base64
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch
import yaml
from diffusers import StableDiffusionPipeline

from agents import load_run
from agents.cli.main import main
from dpok_gym.models.lora_files import FILE_NAME, read_lora
from tests.agents.common.support import PROMPTS

TOKEN = "hf_of_a_test"


class Hub(ThreadingHTTPServer):
    """Keeps the files that are committed to it.

    Attributes:
        repositories: of each repository, by name: whether it is private, and the files of each revision.
        refuses: whether it knows nobody's token.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), HubRequest)
        self.repositories: dict[str, Any] = {}
        self.large_files: dict[str, bytes] = {}
        self.refuses = False

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def files(self, repository: str, revision: str = "main") -> dict[str, bytes]:
        return self.repositories[repository]["files"][revision]


class HubRequest(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, content: Any, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers["Content-Length"]))

    def do_PUT(self) -> None:
        self.server.large_files[self.path.rpartition("/")[2]] = self.body()
        self.answer({})

    def do_POST(self) -> None:
        body, parts = self.body(), urlsplit(self.path).path.strip("/").split("/")
        if self.server.refuses or self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.answer({"error": "Invalid credentials"}, 401)
        elif parts[-3:] == ["api", "repos", "create"]:
            asked = json.loads(body)
            name = f"{asked['organization'] or 'me'}/{asked['name']}"
            made = {"visibility": asked.get("visibility"), "files": {"main": {}}}
            known = name in self.server.repositories
            self.server.repositories.setdefault(name, made)
            self.answer({"url": f"{self.server.address}/{name}"}, 409 if known else 200)
        elif "validate-yaml" in parts:
            self.answer({"errors": [], "warnings": []})
        elif parts[-2:] == ["objects", "batch"]:
            objects = json.loads(body)["objects"]
            for one in objects:
                one["actions"] = {"upload": {"href": f"{self.server.address}/large/{one['oid']}"}}
            self.answer({"transfer": "basic", "objects": objects})
        else:
            self.in_repository("/".join(parts[2:4]), parts[4], parts[5], body)

    def in_repository(self, name: str, action: str, revision: str, body: bytes) -> None:
        files = self.server.repositories[name]["files"]
        if action == "branch":
            files[revision] = dict(files["main"])
            self.answer({})
        elif action == "preupload":
            answers = []
            for file in json.loads(body)["files"]:
                mode = "lfs" if file["path"].endswith(".safetensors") else "regular"
                answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False})
            self.answer({"files": answers})
        else:
            assert action == "commit"
            as_request = "create_pr=1" in self.path
            target = {} if as_request else files[revision]
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    target[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    target[value["path"]] = self.server.large_files[value["oid"]]
            if as_request:
                files["refs/pr/1"] = target
            address = f"{self.server.address}/{name}/commit/abc"
            self.answer({"commitUrl": address, "commitOid": "abc", "pullRequestUrl": f"{address[:-11]}/discussions/1"})


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.address)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    yield server
    server.shutdown()
    server.server_close()


def test_an_agent_without_a_run(hub: Hub, make_agent: Callable[..., Any], tiny_sd_folder: Path, tmp_path: Path) -> None:
    agent = make_agent()
    agent.learn(12)  # one iteration of four images
    assert agent.push_to_hub("me/rabbits", token=TOKEN) == f"{hub.address}/me/rabbits/commit/abc"
    files = hub.files("me/rabbits")
    assert set(files) == {FILE_NAME, "README.md"}
    (tmp_path / FILE_NAME).write_bytes(files[FILE_NAME])
    read = read_lora(tmp_path, agent.process.model.denoiser)
    assert all(torch.equal(read[name], value) for name, value in agent.policy.lora.state_dict().items())
    StableDiffusionPipeline.from_pretrained(tiny_sd_folder).load_lora_weights(tmp_path)
    card = files["README.md"].decode()
    header = yaml.safe_load(card.split("---\n")[1])
    assert header["tags"][:2] == ["lora", "text-to-image"]
    assert "base_model" not in header  # it is in no hub
    assert "instance_prompt" not in header
    assert "pipe.load_lora_weights('me/rabbits')" in card
    assert f"images drawn in training: {agent.images_drawn} (seed 0)" in card
    assert str(tiny_sd_folder.parent) not in card
    assert not any(prompt in card for prompt in PROMPTS)
    assert "| `kl_coef` |" in card
    assert hub.repositories["me/rabbits"]["visibility"] is None  # the owner's default

    # Again: to a branch, and as a request.
    agent.push_to_hub("me/rabbits", token=TOKEN, revision="second")
    agent.push_to_hub("me/rabbits", token=TOKEN, create_pr=True)
    assert set(hub.repositories["me/rabbits"]["files"]) == {"main", "second", "refs/pr/1"}
    agent.push_to_hub("hidden", token=TOKEN, private=True)
    assert hub.repositories["me/hidden"]["visibility"] == "private"


def test_a_whole_denoiser(hub: Hub, make_agent: Callable[..., Any]) -> None:
    make_agent(policy_kwargs={"lora_rank": 0}).push_to_hub("me/whole", token=TOKEN)
    files = hub.files("me/whole")
    assert {"model_index.json", "README.md", "unet/diffusion_pytorch_model.safetensors"} <= set(files)
    assert "DiffusionPipeline.from_pretrained('me/whole')" in files["README.md"].decode()


@pytest.mark.slow
def test_the_agent_of_a_run(hub: Hub, tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = ["--images", "2", "--images-per-iteration", "2", "--eval-images", "2", "--lora-rank", "2"]
    assert main(["train", "--out", str(run), *options, "--num-inference-steps", "2", "--device", "cpu"]) == 0
    agent = load_run(run, "cpu")
    agent.push_to_hub("me/squares", token=TOKEN)
    files = hub.files("me/squares")
    assert set(files) == {FILE_NAME, "README.md", "before_after.png", "learning_curve.png"}
    assert files["before_after.png"] == (run / "before_after.png").read_bytes()
    card = files["README.md"].decode()
    assert yaml.safe_load(card.split("---\n")[1])["instance_prompt"] == "three green squares"
    assert "| reward trained on |" in card
    agent.push_to_hub("me/hidden", token=TOKEN, figures=False)
    assert set(hub.files("me/hidden")) == {FILE_NAME, "README.md"}
    assert agent.training.scores
    agent.learn(4)  # what the run measured is not of this agent any more
    assert (agent.training.images, agent.training.scores, agent.training.figures) == (4, {}, ())
    agent.images_drawn = 2  # as after a fit, which draws none
    assert agent.training.scores == {}


def test_refusals(hub: Hub, make_agent: Callable[..., Any]) -> None:
    agent = make_agent()
    hub.refuses = True
    with pytest.raises(OSError, match="401"):
        agent.push_to_hub("me/rabbits", token=TOKEN)
    for name in ("a/b/c", "", "me/rabbits..", "me/my rabbits"):
        with pytest.raises(ValueError, match=r"(?i)repo"):
            agent.push_to_hub(name, token=TOKEN)
    for value in (None, 3):
        with pytest.raises(TypeError, match='repo_id must be a text such as "user/name"'):
            agent.push_to_hub(value, token=TOKEN)
    assert not hub.repositories
