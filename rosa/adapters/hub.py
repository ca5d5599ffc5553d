"""Adapters on the Hugging Face hub."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, RevisionNotFoundError
from huggingface_hub.utils import validate_repo_id
from torch import nn

from rosa.adapters.card import PAPERS, model_card
from rosa.adapters.disk import adapter_config
from rosa.adapters.folder import (
    CARD_NAME,
    CONFIG_NAME,
    FORM_NAME,
    NOTE_NAME,
    PEFT_CONFIG_NAME,
    TOKENIZER_FILES,
    WEIGHTS_NAME,
    is_note,
    is_our_card,
    is_peft,
    model_file,
    read_adapter,
)
from rosa.adapters.plan import method_of
from rosa.adapters.run_figures import run_figures
from rosa.adapters.saving import not_finite, save_adapter


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    *,
    adapter_name: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> str:
    """Pushes an adapter of a model and its model card to a repository of the hub, which is made if need be.

    An adapter there is replaced; a model card that RoSA did not write stays. `load_adapter(model, repo_id)` loads what
    was pushed.

    Args:
        model (nn.Module): a patched model.
        repo_id (str): "user/name".
        adapter_name (str, optional): None pushes the active adapter.
        private (bool, optional): whether a repository that is made is private; None leaves it to the hub.
        token (str, optional): None takes the one that `hf auth login` stored, or HF_TOKEN.
        commit_message (str, optional): of the commit; None names the kind of adapter.
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
    check_target(repo_id, revision, create_pr)
    with TemporaryDirectory() as folder:
        save_adapter(model, folder, adapter_name)
        return _push(
            Path(folder), repo_id, private=private, token=token, commit_message=commit_message, revision=revision,
            create_pr=create_pr,
        )  # fmt: skip


def push_folder(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> str:
    """Pushes the adapter in a folder, RoSA's or peft's, without its base: with its tokenizer, the form of its prompts,
    and a model card that has the figures of its run; checkpoints and all else in the folder stay where they are.

    Args, Returns, Raises: those of `push_to_hub`, a folder in place of the model; and
        FileNotFoundError: there is no adapter in the folder.
        ValueError: the adapter is damaged, or what the folder says of its run is.
    """
    check_target(repo_id, revision, create_pr)
    return _push(
        Path(folder), repo_id, private=private, token=token, commit_message=commit_message, revision=revision,
        create_pr=create_pr, replaces=(FORM_NAME,),
    )  # fmt: skip


def check_target(repo_id: str, revision: str | None, create_pr: bool) -> None:
    """Raises ValueError where this is no place to push to."""
    validate_repo_id(repo_id)
    if create_pr and revision is not None:
        raise ValueError(f"create_pr asks for a pull request to the main branch, revision for a commit on {revision!r}")


def _push(
    folder: Path,
    repo_id: str,
    *,
    private: bool | None,
    token: str | None,
    commit_message: str | None,
    revision: str | None,
    create_pr: bool,
    replaces: tuple[str, ...] = (),
) -> str:
    description, tensors = read_adapter(folder)
    if is_peft(folder):
        title = str(description.get("peft_type"))
    else:
        title = PAPERS[method_of(adapter_config(description, folder))].title
    broken = not_finite(tensors)
    if broken:
        raise FloatingPointError(f"{broken}, so the adapter in {folder} was not pushed")
    card = model_card(description, tensors, source=repo_id, figures=run_figures(folder))
    api = HfApi(token=token)
    with TemporaryDirectory() as made:
        staged = Path(made)
        _stage(folder, staged, card)
        try:
            api.create_repo(repo_id, private=private, exist_ok=True)
            if revision is not None:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            others = _files_of_others(api, repo_id, revision)
            for name in others:
                (staged / name).unlink(missing_ok=True)
            of_adapter = {CONFIG_NAME, PEFT_CONFIG_NAME, NOTE_NAME, *replaces} - {*others}
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=staged,
                commit_message=commit_message or f"Upload a {title} adapter",
                revision=revision,
                create_pr=create_pr,
                # Of the adapter that was there.
                delete_patterns=[name for name in of_adapter if not (staged / name).exists()],
            )
        except HfHubHTTPError as error:
            if error.response.status_code not in (401, 403):
                raise
            raise PermissionError(
                f"{api.endpoint} did not let this token write to {repo_id}: log in with `hf auth login`, or set "
                f"HF_TOKEN to one with write access to the repository ({error})"
            ) from error
        except (OSError, ValueError):
            raise
        except Exception as error:  # the HTTP client's, whose package differs between versions of huggingface_hub
            raise ConnectionError(f"{repo_id} could not be pushed to {api.endpoint}: {error}") from error
    return commit.pr_url or commit.commit_url


def _stage(folder: Path, staged: Path, card: str) -> None:
    """Puts what is to be pushed of an adapter's folder into another one."""
    names = (WEIGHTS_NAME, CONFIG_NAME, PEFT_CONFIG_NAME, FORM_NAME, *TOKENIZER_FILES)
    files = {file for name in names for file in folder.glob(name) if file.is_file()}
    note, own_card = folder / NOTE_NAME, folder / CARD_NAME
    if note.is_file() and is_note(note.read_bytes()):
        files.add(note)
    if own_card.is_file() and not _is_written_by_a_program(own_card.read_bytes()):
        files.add(own_card)
    else:
        (staged / CARD_NAME).write_text(card, encoding="utf-8")
    for file in files:
        shutil.copy(file, staged / file.name)


def _is_written_by_a_program(card: bytes) -> bool:
    """Whether it is our card, or what peft writes for somebody to fill in."""
    return is_our_card(card) or b"[More Information Needed]" in card


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
        ours = {CARD_NAME: _is_written_by_a_program, NOTE_NAME: is_note}
        return [name for name, is_ours in ours.items() if name in there and not is_ours(read(name))]
