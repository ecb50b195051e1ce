"""The mechanics of an update that all agents share: optimiser steps, micro-batches, logged means.

Letters used for shapes: B elements of a batch.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from torch import Tensor, nn

from agents.common import distributed, losses
from agents.common.anchor import Anchor
from agents.common.buffer import Batch
from agents.common.losses import Metrics
from agents.common.matching import NoisyImages
from agents.common.policy import DenoisingPolicy
from dpok_gym.rewards import NonFiniteError
from dpok_gym.utils.batching import BatchSize
from dpok_gym.utils.sharding import is_sharded, whole


class UpdatingAlgorithm(OnPolicyAlgorithm):
    """An algorithm that takes optimiser steps on the mean loss of batches.

    ``with self.optimizer_step(): self.backward(batch)`` is one step. The loss is the subclass's; with an anchor, each
    step adds ``anchor_coef`` times the loss that diffusion models are trained with, on images of the pre-trained model.

    Attributes:
        latest_metrics: what the latest update logged, by name; empty before the first one.
    """

    policy: DenoisingPolicy
    max_grad_norm: float
    latest_metrics: dict[str, float]
    anchor_coef: float
    anchor_images: int
    _anchor: Anchor | None
    _micro_batches: BatchSize
    _metrics: dict[str, list[Tensor]]

    @abstractmethod
    def loss(self, batch: Any) -> tuple[Tensor, Metrics]:
        """The loss of each element of a batch, (B,), and metrics to log, (B,) each, or fewer if some have none."""

    @contextmanager
    def _logged_update(self, n_images: int) -> Iterator[None]:
        """Around an update: sets the learning rate before, logs the means of the metrics and the speed after."""
        self._metrics = defaultdict(list)
        started = time.perf_counter()
        self._update_learning_rate(self.policy.optimizer)
        yield
        self.latest_metrics = self.mean_metrics()
        for name, mean in self.latest_metrics.items():
            self.logger.record(f"train/{name}", mean)
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        self.logger.record("time/update_images_per_second", n_images / (time.perf_counter() - started))

    def log_metrics(self, metrics: Mapping[str, Tensor]) -> None:
        """Adds tensors (B,) to the means that the update logs."""
        for name, values in metrics.items():
            self._metrics[name].append(values.detach().reshape(-1))

    def mean_metrics(self) -> dict[str, float]:
        """Returns the means of the metrics of this update so far, over the elements of all ranks."""
        columns = {name: torch.cat(values) for name, values in self._metrics.items()}
        if distributed.count() == 1:
            return {name: values.mean().item() for name, values in columns.items() if len(values)}
        # A rank without images in a batch lacks some names.
        names = sorted({name for text in distributed.gather_texts("\n".join(columns)) for name in text.split("\n")})
        own = [columns.get(name, torch.zeros(0)).double() for name in names]
        sums = torch.tensor([[values.sum().item(), len(values)] for values in own], dtype=torch.float64)
        sums = distributed.total(sums)
        return {name: (value / n).item() for name, (value, n) in zip(names, sums, strict=True) if n}

    @contextmanager
    def optimizer_step(self) -> Iterator[None]:
        """Around calls of :meth:`backward`, which add up: no gradient before; clips it and takes the step after.

        Raises:
            NonFiniteError: if the gradient is infinite or NaN; no step is taken.
        """
        self.policy.optimizer.zero_grad()
        yield
        if self.anchor_coef:
            self._add_anchor_gradient()
        distributed.sum_gradients(self.policy.denoiser_parameters())
        # Only the denoiser's: the critic learns by itself, and its gradients must not shrink the policy's.
        norm = whole(nn.utils.clip_grad_norm_(self.policy.denoiser_parameters(), self.max_grad_norm))
        if not norm.isfinite():  # the step would make all weights NaN
            raise NonFiniteError(
                "the gradient is infinite or NaN, so this step was not taken and the weights are those of the step "
                "before: take a smaller learning_rate, another ratio (see clip_fraction in the log), or float32"
            )
        self.log_metrics({"grad_norm": norm})
        self.policy.optimizer.step()
        self._n_updates += 1

    def backward(self, batch: Batch) -> None:
        """Adds the gradient of the batch's mean loss to that of earlier calls, one micro-batch at a time.

        With several ranks it is the share that this one has of the gradient; :meth:`optimizer_step` adds the shares.
        """
        trained = [value for group in self.policy.optimizer.param_groups for value in group["params"]]
        earlier = [value.grad for value in trained]

        def attempt(micro_batch_size: int) -> list[Metrics]:
            self.policy.optimizer.zero_grad()  # to None, also after an attempt that ran out of memory in the middle
            return self._add_gradient(self.loss, batch, micro_batch_size)

        for metrics in self._micro_batches.run(attempt, len(batch)):
            self.log_metrics(metrics)
        for value, before in zip(trained, earlier, strict=True):
            if before is not None:
                value.grad = before if value.grad is None else before.add_(value.grad)

    def anchor_loss(self, batch: NoisyImages) -> tuple[Tensor, Metrics]:
        """coef || output - target ||^2 of each noisy image of the pre-trained model, (B,)."""
        output = self.policy.predict_output(batch.state, guidance_scale=1.0)
        loss = losses.denoising_loss(output, batch.target)
        return self.anchor_coef * loss, {"anchor_loss": loss.detach()}

    def _add_anchor_gradient(self) -> None:
        if self._anchor is None:
            self._anchor = Anchor.draw(self, self.anchor_images)  # type: ignore[arg-type]
        batch = self._anchor.batch(self).share()  # type: ignore[arg-type]
        # The algorithm's own loss has found the micro-batch that fits into memory.
        for metrics in self._add_gradient(self.anchor_loss, batch, self._micro_batches.size):
            self.log_metrics(metrics)

    def _add_gradient(
        self, loss_function: Callable[[Any], tuple[Tensor, Metrics]], batch: Batch, micro_batch_size: int | None
    ) -> list[Metrics]:
        collected = []
        for part in batch.split(micro_batch_size):
            # The block goes on through the backward pass, which may compute parts of the network again.
            with self.policy.adapter_enabled():
                loss, metrics = loss_function(part)
                # Divided by the whole batch, so that the parts add up to the gradient of its mean.
                (loss.sum() / batch.whole_size).backward()
            collected.append(metrics)
        # The ranks call a network that is spread over them together, so all of them call it as often.
        if is_sharded(self.policy.model.denoiser) and batch.n_of_largest_share:
            size = self._micro_batches.size or batch.n_of_largest_share
            missing = -(-batch.n_of_largest_share // size) - len(collected)
            for _ in range(missing):
                with self.policy.adapter_enabled():
                    loss, _ = loss_function(batch.blank())
                    loss.backward(torch.zeros_like(loss))
        return collected
