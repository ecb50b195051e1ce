"""Uploading to the Hugging Face hub."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.utils import validate_repo_id


def upload_model(
    write: Callable[[Path], None],
    repo_id: str,
    commit_message: str,
    private: bool | None,
    token: str | bool | None,
    revision: str | None,
    create_pr: bool,
) -> str:
    """Uploads files to a model repository, which is made if it is not there.

    Args:
        write: writes the files into a folder.
        repo_id: this and the others as of :meth:`agents.common.algorithm.DenoisingAlgorithm.push_to_hub`.

    Returns:
        The address of the commit.
    """
    if not isinstance(repo_id, str):
        raise TypeError(f'repo_id must be a text such as "user/name", got {repo_id!r}')
    validate_repo_id(repo_id)
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))  # first, so that an error here leaves no empty repository
        api = HfApi(token=token)
        # The hub may answer with another name, such as one with the user before it.
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        return api.upload_folder(
            repo_id=repo_id, folder_path=folder, commit_message=commit_message, revision=revision, create_pr=create_pr
        ).commit_url
