"""An agent's methods that write its model for other programs: LoRA files, diffusers pipelines, the hub."""

from __future__ import annotations

import pathlib
from dataclasses import replace
from typing import Any

from agents.common.hub import upload_model
from agents.common.model_card import Training, write_card
from agents.common.policy import DenoisingPolicy
from dpok_gym.models.lora_files import Ranks
from dpok_gym.samplers import DenoisingProcess


class Exportable:
    """The methods of an agent that write what it has learned, for other programs."""

    policy: DenoisingPolicy
    process: DenoisingProcess
    images_drawn: int
    iteration: int

    #: The training of the run that the agent was loaded from, and its iteration; :func:`agents.load_run` sets them.
    _training: Training | None = None
    _training_iteration: int = 0

    def save_lora(self, folder: str | pathlib.Path) -> pathlib.Path:
        """Writes the LoRA as diffusers' ``load_lora_weights(folder)`` reads it; returns the file's path."""
        return self.policy.save_lora(folder)

    @property
    def training(self) -> Training:
        """The entries of a model card about this agent; for an agent of a run, its scores and figures too."""
        known = self._training
        if known is None:
            return Training.of(self)  # type: ignore[arg-type]  # every agent is a DenoisingAlgorithm
        if self._training_iteration == self.iteration:
            return known
        now = Training.of(self)  # type: ignore[arg-type]
        # The scores and the figures are of the agent before.
        return replace(known, images=now.images, optimizer_steps=now.optimizer_steps, scores={}, figures=())

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str = "Push what was learned",
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        figures: bool = True,
    ) -> str:
        """Uploads what was learned, with a model card, to a model repository of the Hugging Face hub.

        It uploads the LoRA in diffusers' format, or the whole pipeline after ``lora_rank=0``; and ``README.md``, with
        the settings, the scores and the names of the prompts and the rewards. If there is one prompt only, the prompt
        itself is in it. An agent of :func:`~agents.load_run` also uploads the figures of its run, which show images and
        prompts. The repository is public unless ``private`` or your organisation says otherwise.

        Args:
            repo_id: ``"user/name"``; made if it is not there.
            commit_message: of the commit.
            private: whether a new repository is private; None for the default of its owner.
            token: of the hub; None for the one that ``hf auth login`` stored.
            revision: branch to commit to; None for the main one. A branch that is not there is made.
            create_pr: whether to open a pull request in place of a commit.
            figures: whether to upload the figures of the run.

        Returns:
            The address of the commit.

        Raises:
            ValueError: if the repository's name is no such name, or diffusers has no pipeline for the model.
            OSError: if the hub cannot be reached, or refuses.
        """
        training = self.training if figures else replace(self.training, figures=())

        def write(folder: pathlib.Path) -> None:
            if self.policy.lora is None:
                self.save_pretrained(folder)
                write_card(folder, training, "merged", repo_id=repo_id)
            else:
                self.save_lora(folder)
                write_card(folder, training, "diffusers", Ranks.of(self.policy.lora.state_dict()), repo_id)

        return upload_model(write, repo_id, commit_message, private, token, revision, create_pr)

    def pipeline(self) -> Any:
        """Returns a diffusers pipeline that draws with what was learned.

        The LoRA is merged into a copy of the denoiser; the other networks are shared with the agent. Draw with
        ``eta=...`` and ``guidance_scale=...`` of the environment.
        """
        return self.process.model.to_pipeline(self.policy.merged_denoiser())

    def save_pretrained(self, folder: str | pathlib.Path) -> None:
        """Writes :meth:`pipeline` as a folder that diffusers' ``from_pretrained`` and ``model=folder`` read.

        The weights have the model's own precision. In bfloat16 small changes of a LoRA are lost: load the run with a
        float32 model, or use ``dpok export --format merged``, which does so.
        """
        self.pipeline().save_pretrained(folder)
