"""Training with reward servers that fail: ``python -m benchmarks.reward_faults``.

It trains on the mixture world, with the reward behind an address, and prints one line for each part:

1. a server that fails 20 % of its requests: status 500, no answer in time, an answer that is cut off, has the wrong
   number of rewards or a NaN, a closed connection. The weights must be those of the run without faults, bit for bit,
   and each image must be scored as often as there: once;
2. two servers, one of which always fails: the same;
3. ``dpok train`` with a server that goes away for good. It must end with an error, and what it learned until then must
   be saved: whole iterations, and no more images than were scored.

It ends with an error if one of these does not hold.
"""

from __future__ import annotations

import argparse
import base64
import io
import itertools
import json
import random
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from agents import DPOK
from agents.cli.main import main as dpok
from agents.common.checkpoint import find_checkpoint
from dpok_gym import DenoisingVectorEnv, RemoteReward
from dpok_gym.rewards import make_reward

FAULTS = ("status 500", "too late", "cut off", "wrong count", "NaN", "closed")
#: Seconds that the client waits for an answer.
TIMEOUT = 2.0
N_ENVS, STEPS = 8, 5


class FaultyServer(ThreadingHTTPServer):
    """A reward server that fails now and then.

    Args:
        share: probability that a request fails, in [0, 1].
        lifetime: number of requests after which it answers no more; None for no end.

    Attributes:
        url: its address.
        scored: how often each image was answered with its reward, by its file.
        faults: how often each fault happened.
    """

    daemon_threads = True

    def __init__(self, share: float, lifetime: int | None = None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.share, self.lifetime = share, lifetime
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.scored: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.reward = make_reward("mixture-bump")
        self._random, self._faults = random.Random(0), itertools.cycle(FAULTS)
        self._lock, self._requests = threading.Lock(), 0

    def next_fault(self) -> str | None:
        """Chooses what happens to the next request; None for nothing bad."""
        with self._lock:
            self._requests += 1
            if self.lifetime is not None and self._requests > self.lifetime:
                return "closed"
            fault = next(self._faults) if self._random.random() < self.share else None
            self.faults.update([fault] if fault else [])
            return fault

    def handle_error(self, *args: Any) -> None:
        """A client that has gone is a part of the test."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultyServer

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["content-length"])))
        fault = self.server.next_fault()
        if fault == "closed":
            self.close_connection = True
            return
        if fault == "too late":
            time.sleep(1.5 * TIMEOUT)
        rewards = self.server.reward(_decode(request["images"]), request["prompts"]).total.tolist()
        if fault == "wrong count":
            rewards = rewards[1:]
        if fault == "NaN":
            rewards[0] = float("nan")
        body = json.dumps({"rewards": rewards}).encode()
        self.send_response(500 if fault == "status 500" else 200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if fault == "cut off" else body)
        self.close_connection = fault == "cut off"
        if fault is None:
            with self.server._lock:
                self.server.scored.update(request["images"])

    def log_message(self, *args: Any) -> None:
        """Logs nothing."""


def _decode(files: Sequence[str]) -> Tensor:
    images = [np.asarray(Image.open(io.BytesIO(base64.b64decode(file)))) for file in files]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255


@contextmanager
def serving(share: float, lifetime: int | None = None) -> Iterator[FaultyServer]:
    """Runs a :class:`FaultyServer` in the block."""
    with FaultyServer(share, lifetime) as server:
        thread = threading.Thread(target=server.serve_forever, args=[0.01], daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()


def train(iterations: int, *servers: FaultyServer) -> tuple[list[Tensor], Counter[str]]:
    """Trains with the servers' reward; returns the weights, and how often each image was scored, by its file."""
    reward = RemoteReward([server.url for server in servers], name="bump", timeout=TIMEOUT, backoff=0.01, batch_size=4)
    env = DenoisingVectorEnv(
        N_ENVS, model="mixture", prompts="mixture", reward=reward, num_inference_steps=STEPS, device="cpu"
    )
    # The critic would ask for the rewards of further images.
    agent = DPOK(env=env, seed=0, device="cpu", images_per_iteration=N_ENVS, use_critic=False)
    agent.learn(iterations * N_ENVS * STEPS)
    scored = sum((server.scored for server in servers), Counter())
    return [weights.detach().clone() for weights in agent.policy.parameters()], scored


def train_until_it_goes_away(iterations: int, folder: Path) -> None:
    """Runs ``dpok train`` with a server that goes away after this number of iterations and a half.

    Raises:
        RuntimeError: if the command does not end with an error, or what it saved are not these iterations.
    """
    # The first request is for the images of the evaluation.
    with serving(0.0, lifetime=1 + iterations) as server:
        words = ["train", "--env", "DPOK-Mixture-v0", "--reward", server.url, "--out", str(folder), "--device", "cpu"]
        words += ["--n-envs", str(N_ENVS), "--images", str(1000 * N_ENVS), "--eval-images", "4"]
        words += ["--num-inference-steps", str(STEPS), "--images-per-iteration", str(N_ENVS)]
        words += ["--checkpointing-steps", str(10 * iterations), "--no-use-critic"]
        code = dpok(words)
    state = json.loads((find_checkpoint(folder) / "trainer_state.json").read_text(encoding="utf-8"))
    saved = state["agent"]["images_drawn"]
    if code != 2 or saved != iterations * N_ENVS:
        raise RuntimeError(
            f"the run ended with exit code {code} and {saved} images; 2 and {iterations * N_ENVS} are due"
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the three parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=200, help="of the runs of parts 1 and 2")
    options = parser.parse_args(arguments)
    with serving(0.0) as good:
        expected = train(options.iterations, good)
    if expected[1].total() != options.iterations * N_ENVS:
        raise RuntimeError(f"{expected[1].total()} images were scored, not {options.iterations * N_ENVS}")
    with serving(0.2) as faulty:
        _compare(train(options.iterations, faulty), expected)
        happened = ", ".join(f"{count} x {fault}" for fault, count in sorted(faulty.faults.items()))
        print(f"a server with faults ({happened}): the same weights, {faulty.scored.total()} images scored once each")
    with serving(1.0) as bad, serving(0.0) as good:
        _compare(train(options.iterations, bad, good), expected)
        print(f"two servers, one of them bad ({bad.faults.total()} faults): the same weights")
    with tempfile.TemporaryDirectory() as folder:
        train_until_it_goes_away(3, Path(folder) / "run")
    print("a server that goes away: the run ends with an error, and its 3 iterations are saved")


def _compare(ours: tuple[list[Tensor], Counter[str]], expected: tuple[list[Tensor], Counter[str]]) -> None:
    if not all(torch.equal(weights, others) for weights, others in zip(ours[0], expected[0], strict=True)):
        raise RuntimeError("the weights are not those of the run without faults")
    if ours[1] != expected[1]:
        raise RuntimeError(f"{ours[1].total()} images were scored, not the {expected[1].total()} of the other run")


if __name__ == "__main__":
    main()
