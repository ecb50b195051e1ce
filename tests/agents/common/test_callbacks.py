"""The progress bar, and Stable-Baselines3's own callbacks."""

import io
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback, EvalCallback, StopTrainingOnMaxEpisodes
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv

from agents import DDPO, DPOK, GymnasiumVecEnv, RewardWeightedSFT
from agents.common.callbacks import ProgressCallback
from dpok_gym import DenoisingEnv
from tests.agents.common.support import Watch, snapshot
from tests.support import assert_same

N, T = 4, 3
UPDATE = N * T


# --- The progress bar


class Drawn(ProgressCallback):
    """A progress bar that notes what it shows at the end of each rollout."""

    def __init__(self, images: int) -> None:
        super().__init__(images, disable=False)
        self.shown: list[tuple[int, str]] = []

    def _on_training_start(self) -> None:
        super()._on_training_start()
        assert self._bar is not None
        self._bar.fp = io.StringIO()

    def _on_rollout_end(self) -> None:
        super()._on_rollout_end()
        assert self._bar is not None
        self.shown.append((self._bar.n, self._bar.postfix))


@pytest.mark.slow
def test_the_bar_counts_images_and_shows_the_latest_update(make_agent: Callable[..., Any]) -> None:
    agent, bar = make_agent(), Drawn(3 * N)
    agent.learn(3 * UPDATE, bar)
    assert [n for n, _ in bar.shown] == [N, 2 * N, 3 * N]
    rewards = [episode["r"] for episode in agent.ep_info_buffer]
    assert bar.shown[0][1].startswith(f"reward {np.mean(rewards[:N]):.3f}")
    assert bar.shown[2][1].startswith(f"reward {np.mean(rewards):.3f}, KL ")
    assert bar.shown[2][1].endswith(" nats")
    assert bar._bar.total == 3 * N
    assert bar._bar.disable  # closed


@pytest.mark.slow
def test_the_bar_starts_where_the_agent_is(make_agent: Callable[..., Any]) -> None:
    agent, bar = make_agent(), Drawn(2 * N)
    agent.learn(UPDATE)
    agent.learn(UPDATE, bar, reset_num_timesteps=False)
    assert bar._bar.initial == N
    assert [n for n, _ in bar.shown] == [2 * N]


@pytest.mark.slow
def test_the_bar_shows_a_fit_too(make_agent: Callable[..., Any]) -> None:
    agent, bar = make_agent(algorithm=RewardWeightedSFT, n_gradient_steps=3, log_every=2, batch_size=2), Drawn(N)
    agent.learn(UPDATE, bar)
    assert [n for n, _ in bar.shown] == [N] * 3
    assert ", update 2, loss 0." in bar.shown[1][1] or ", update 2, loss 1." in bar.shown[1][1]


@pytest.mark.slow
def test_seconds_of_training(make_agent: Callable[..., Any]) -> None:
    agent, bar = make_agent(), ProgressCallback(2 * N, disable=True)
    assert bar.seconds == 0
    seen: list[float] = []
    started = time.perf_counter()
    agent.learn(UPDATE, [bar, Watch(lambda _: seen.append(bar.seconds))])
    assert 0 < seen[0] < seen[-1] < bar.seconds <= time.perf_counter() - started
    first = bar.seconds
    agent.learn(UPDATE, bar)  # a second training adds to it
    assert bar.seconds > first


@pytest.mark.slow
def test_the_seconds_go_on(make_agent: Callable[..., Any]) -> None:
    """The log of a resumed training counts the seconds and the images of all its processes."""
    agent = make_agent()
    agent.learn(UPDATE)
    agent.learn(UPDATE, ProgressCallback(2 * N, disable=True, seconds=100.0), reset_num_timesteps=False)
    elapsed = (time.time_ns() - agent.start_time) / 1e9
    assert 100 < elapsed < 160
    assert agent._num_timesteps_at_start == 0


def test_the_rest_is_estimated_after_two_iterations(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    bar = ProgressCallback(10 * N)
    process = SimpleNamespace(num_inference_steps=T)
    model: Any = SimpleNamespace(process=process, num_timesteps=0, draws_images=True)
    bar.model = model
    said = []
    for seconds, iterations in ((0.0, 0), (500.0, 1), (540.0, 2), (600.0, 3)):  # the first one compiles
        now[0], bar.model.num_timesteps = seconds, iterations * N * T
        bar._on_rollout_start()
        said.append(capsys.readouterr().out)
    assert said == ["", "", "32 images are left: 5 minutes, at 10 seconds an image\n", ""]


@pytest.mark.slow
def test_the_bar_is_closed_after_an_interruption(make_agent: Callable[..., Any]) -> None:
    agent, bar = make_agent(), Drawn(2 * N)

    def interrupt(watch: Watch) -> None:
        if watch.n_calls == T + 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        agent.learn(2 * UPDATE, [bar, Watch(interrupt)])
    bar.close()
    assert bar._bar.disable
    assert bar._bar.n == N
    seconds = bar.seconds
    assert seconds > 0
    bar.close()  # once is enough
    assert bar.seconds == seconds


# --- Stable-Baselines3's


@pytest.mark.slow
def test_each_iteration_is_one_rollout(make_env: Callable[..., Any], make_agent: Callable[..., Any]) -> None:
    """Callbacks that save are asked when nothing is half done."""
    events: list[tuple[str, int, int, int]] = []

    class Listen(BaseCallback):
        def note(self, event: str) -> None:
            agent: Any = self.model
            events.append((event, agent.iteration, agent.images_drawn, agent._n_updates))

        def _on_training_start(self) -> None:
            self.note("training start")

        def _on_rollout_start(self) -> None:
            self.note("start")

        def _on_step(self) -> bool:
            self.note("step")
            return True

        def _on_rollout_end(self) -> None:
            self.note("end")

        def _on_training_end(self) -> None:
            self.note("training end")

    make_agent(make_env(2), images_per_iteration=N).learn(2 * UPDATE, Listen())
    first = [("start", 0, 0, 0), *[("step", 0, 0, 0)] * 2 * T, ("end", 0, 0, 0)]
    second = [("start", 1, N, 1), *[("step", 1, N, 1)] * 2 * T, ("end", 1, N, 1)]
    assert events == [("training start", 0, 0, 0), *first, *second, ("training end", 2, 2 * N, 2)]


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", [DPOK, DDPO])
def test_checkpoints_and_evaluations(
    make_agent: Callable[..., Any], settings: dict[str, Any], tmp_path: Path, algorithm: Any
) -> None:
    agent = make_agent(algorithm=algorithm)
    callbacks = [
        CheckpointCallback(save_freq=T, save_path=str(tmp_path / "checkpoints")),
        EvalCallback(
            DummyVecEnv([lambda: Monitor(DenoisingEnv(**settings))]),
            n_eval_episodes=2,
            eval_freq=T,
            log_path=str(tmp_path),
            best_model_save_path=str(tmp_path / "best"),
            deterministic=False,
            verbose=0,
        ),
    ]
    with pytest.warns(UserWarning, match="Training and eval env are not of the same type"):
        agent.learn(2 * UPDATE, callback=callbacks)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == [f"rl_model_{n}_steps.zip" for n in (UPDATE, 2 * UPDATE)]
    evaluations = np.load(tmp_path / "evaluations.npz")
    assert evaluations["timesteps"].tolist() == [UPDATE, 2 * UPDATE]
    assert evaluations["ep_lengths"].tolist() == [[T, T]] * 2
    for path in (tmp_path / "checkpoints" / names[0], tmp_path / "best" / "best_model.zip"):
        algorithm.load(path, device="cpu")
    # The evaluations in between have changed nothing.
    assert_same(snapshot(agent), snapshot(make_agent(algorithm=algorithm).learn(2 * UPDATE)))


@pytest.mark.slow
def test_a_vector_environment_evaluates_too(
    make_env: Callable[..., Any], make_agent: Callable[..., Any], only_warnings: Callable[..., Any]
) -> None:
    callback = EvalCallback(GymnasiumVecEnv(make_env(2)), n_eval_episodes=4, eval_freq=T, verbose=0)
    with only_warnings("Training and eval env are not of the same type", "Evaluation environment is not wrapped"):
        make_agent().learn(UPDATE, callback)
    assert np.isfinite(callback.last_mean_reward)  # it is -inf before the first evaluation


@pytest.mark.slow
def test_evaluate_policy(make_agent: Callable[..., Any], settings: dict[str, Any]) -> None:
    agent = make_agent()
    env = Monitor(DenoisingEnv(**settings))
    rewards, lengths = evaluate_policy(agent, env, n_eval_episodes=3, return_episode_rewards=True)
    assert lengths == [T] * 3
    assert np.isfinite(rewards).all()
    assert len(set(rewards)) == 3


@pytest.mark.slow
def test_a_callback_can_stop_between_rollouts(make_agent: Callable[..., Any]) -> None:
    agent = make_agent()
    agent.learn(10 * UPDATE, StopTrainingOnMaxEpisodes(2))  # for each environment
    # The callback is asked before the second update, so the second iteration is not complete.
    assert (agent.iteration, agent.images_drawn, agent._n_updates) == (1, N, 1)
