"""Adapters on the Hugging Face hub."""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import HfApi
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RevisionNotFoundError
from huggingface_hub.utils import validate_repo_id
from torch import nn

from rosa.adapter import CARD_NAME, save_adapter
from rosa.card import MARK


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    *,
    adapter_name: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str = "Upload a RoSA adapter",
    revision: str | None = None,
    create_pr: bool = False,
) -> str:
    """Pushes an adapter and its model card to a repository of the hub, which is made if need be.

    A model card there that RoSA did not write stays as it is. `load_adapter(model, repo_id)` loads what was pushed.

    Args:
        model (nn.Module): a patched model.
        repo_id (str): "user/name".
        adapter_name (str, optional): None pushes the active adapter.
        private (bool, optional): whether a repository that is made is private; None leaves it to the hub.
        token (str, optional): None takes the one that `hf auth login` stored, or HF_TOKEN.
        commit_message (str): of the commit.
        revision (str, optional): a branch, which is made if need be; None is "main".
        create_pr (bool): open a pull request instead of a commit on the main branch.

    Returns:
        The URL of the commit or of the pull request.

    Raises:
        ValueError: the model is not patched, `repo_id` is no name of a repository, or both `revision` and `create_pr`
            are given.
        KeyError: the model has no such adapter.
        PermissionError: the hub refused the token, or what was asked with it.
        ConnectionError: the hub cannot be reached.
        HfHubHTTPError: another answer of the hub.
    """
    validate_repo_id(repo_id)
    if create_pr and revision is not None:
        raise ValueError(f"create_pr asks for a pull request to the main branch, revision for a commit on {revision!r}")
    api = HfApi(token=token)
    with TemporaryDirectory() as folder:
        save_adapter(model, folder, adapter_name)
        try:
            api.create_repo(repo_id, private=private, exist_ok=True)
            if revision is not None:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            if _has_card_of_its_own(api, repo_id, revision):
                Path(folder, CARD_NAME).unlink()
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                commit_message=commit_message,
                revision=revision,
                create_pr=create_pr,
            )
        except HfHubHTTPError as error:
            if error.response.status_code not in (401, 403):
                raise
            raise PermissionError(
                f"{api.endpoint} did not let this token write to {repo_id}: log in with `hf auth login`, or pass "
                f"token= one with write access to the repository ({error})"
            ) from error
        except (OSError, ValueError):
            raise
        except Exception as error:  # the HTTP client's, whose package differs between versions of huggingface_hub
            raise ConnectionError(f"{repo_id} could not be pushed to {api.endpoint}: {error}") from error
    return commit.pr_url or commit.commit_url


def _has_card_of_its_own(api: HfApi, repo_id: str, revision: str | None) -> bool:
    """Whether the repository has a model card that RoSA did not write."""
    with TemporaryDirectory() as folder:
        try:
            card = api.hf_hub_download(repo_id, CARD_NAME, revision=revision, local_dir=os.fspath(folder))
        except (EntryNotFoundError, RevisionNotFoundError):  # the latter in a repository without commits
            return False
        return MARK not in Path(card).read_text(encoding="utf-8")
