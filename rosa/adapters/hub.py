"""Adapters on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, RevisionNotFoundError
from huggingface_hub.utils import validate_repo_id
from torch import nn

from rosa.adapters.card import MARK
from rosa.adapters.folder import CARD_NAME, NOTE_NAME, PEFT_CONFIG_NAME, is_note, model_file
from rosa.adapters.saving import save_adapter


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

    An adapter there is replaced; a model card that RoSA did not write stays. `load_adapter(model, repo_id)` loads what
    was pushed.

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
        ValueError: the model is not patched, `repo_id` is no name of a repository or that of one which holds a model,
            or both `revision` and `create_pr` are given.
        KeyError: the model has no such adapter.
        FloatingPointError: a value of the adapter is not finite.
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
            for name in _files_of_others(api, repo_id, revision):
                Path(folder, name).unlink()
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                commit_message=commit_message,
                revision=revision,
                create_pr=create_pr,
                delete_patterns=PEFT_CONFIG_NAME,  # of the adapter that was there
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


def _files_of_others(api: HfApi, repo_id: str, revision: str | None) -> list[str]:
    """The files in the repository, of those that RoSA writes beside an adapter, that it did not write.

    Raises:
        ValueError: the repository holds a model.
    """
    try:
        there = api.list_repo_files(repo_id, revision=revision)
    except RevisionNotFoundError:  # a repository without commits
        return []
    with TemporaryDirectory() as folder:

        def read(name: str) -> bytes:
            return Path(api.hf_hub_download(repo_id, name, revision=revision, local_dir=folder)).read_bytes()

        file = model_file(there, lambda: read(NOTE_NAME))
        if file is not None:
            raise ValueError(f"{repo_id} on the hub holds a model ({file}): choose another repository for the adapter")
        ours = {CARD_NAME: lambda content: MARK.encode() in content, NOTE_NAME: is_note}
        return [name for name, is_ours in ours.items() if name in there and not is_ours(read(name))]
