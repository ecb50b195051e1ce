"""The mechanics of an update that all agents share: optimiser steps, micro-batches, logged means.

Letters used for shapes: B elements of a batch.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from torch import Tensor, nn

from agents.common.buffer import Batch
from agents.common.losses import Metrics
from agents.common.policy import DenoisingPolicy
from dpok_gym.utils.batching import BatchSize


class UpdatingAlgorithm(OnPolicyAlgorithm):
    """An algorithm that takes optimiser steps on the mean loss of batches.

    ``with self.optimizer_step(): self.backward(batch)`` is one step. The loss is the subclass's.

    Attributes:
        latest_metrics: what the latest update logged, by name; empty before the first one.
    """

    policy: DenoisingPolicy
    max_grad_norm: float
    latest_metrics: dict[str, float]
    _micro_batches: BatchSize
    _metrics: dict[str, list[Tensor]]

    @abstractmethod
    def loss(self, batch: Any) -> tuple[Tensor, Metrics]:
        """The loss of each element of a batch, (B,), and metrics to log, (B,) each."""

    @contextmanager
    def _logged_update(self, n_images: int) -> Iterator[None]:
        """Around an update: sets the learning rate before, logs the means of the metrics and the speed after."""
        self._metrics = defaultdict(list)
        started = time.perf_counter()
        self._update_learning_rate(self.policy.optimizer)
        yield
        columns = {name: torch.cat(values) for name, values in self._metrics.items()}
        self.latest_metrics = {name: values.mean().item() for name, values in columns.items() if len(values)}
        for name, mean in self.latest_metrics.items():
            self.logger.record(f"train/{name}", mean)
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        self.logger.record("time/update_images_per_second", n_images / (time.perf_counter() - started))

    def log_metrics(self, metrics: Mapping[str, Tensor]) -> None:
        """Adds tensors (B,) to the means that the update logs."""
        for name, values in metrics.items():
            self._metrics[name].append(values.detach().reshape(-1))

    @contextmanager
    def optimizer_step(self) -> Iterator[None]:
        """Around the backward passes of a batch: sets gradients to zero before, clips and takes the step after."""
        self.policy.optimizer.zero_grad()
        yield
        # Only the denoiser's: the critic learns by itself, and its gradients must not shrink the policy's.
        norm = nn.utils.clip_grad_norm_(self.policy.denoiser_parameters(), self.max_grad_norm)
        self.log_metrics({"grad_norm": norm})
        self.policy.optimizer.step()
        self._n_updates += 1

    def backward(self, batch: Batch) -> None:
        """Adds up the gradient of the batch's mean loss, one micro-batch at a time."""
        for metrics in self._micro_batches.run(partial(self._backward, batch), len(batch)):
            self.log_metrics(metrics)

    def _backward(self, batch: Batch, micro_batch_size: int) -> list[Metrics]:
        self.policy.optimizer.zero_grad()  # again, as memory may have run out in the middle
        collected = []
        for part in batch.split(micro_batch_size):
            # The block goes on through the backward pass, which may compute parts of the network again.
            with self.policy.adapter_enabled():
                loss, metrics = self.loss(part)
                # Divided by the whole batch, so that the parts add up to the gradient of its mean.
                (loss.sum() / len(batch)).backward()
            collected.append(metrics)
        return collected
