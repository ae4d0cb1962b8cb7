"""A model saved with its card and what belongs to its weights, in a folder or on the Hugging Face hub."""

from __future__ import annotations

import tempfile
from contextlib import nullcontext
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.utils import logging

from ctclip.card_file import CARD, discard_card, hand_written_card, read_card
from ctclip.config import CALIBRATION_FILE
from ctclip.errors import UserError
from ctclip.evaluation.run_folder import BEST_FILES, check_names, run_record
from ctclip.fileio import replacing
from ctclip.hub.client import AGAIN, REPOSITORY, TOKENS_PAGE, HubError, find_token, is_hub_url, to_hub_error, unwrapped
from ctclip.hub.model_card import card_text, origin
from ctclip.hub.published import CardError, Facts, unchanged
from ctclip.inference.predictor import load_model
from ctclip_model import WRITTEN, CTCLIPMultiAbnormalityModel, listing

SIDECARS = ("run.json", "metrics.json", CALIBRATION_FILE)  # beside the weights, for whoever downloads them


# ---- to a folder


def save_with_card(
    model: CTCLIPMultiAbnormalityModel, target: str | Path, repo_id: str | None = None, cohort: str | None = None
) -> None:
    """`save_pretrained` with the card and those of SIDECARS that belong to these weights.

    Files about other weights are deleted first, then the weights are written, then the files about them: a full disk
    leaves no file beside weights that it does not belong to. A README.md that a person wrote stays, and one in the
    run's folder is copied. In the run's own folder only the card is written. Raises CardError where the folder is a run
    of other weights, which would be lost, and RunError where a file of one of these names is the user's.
    """
    target, facts = Path(target), Facts.of(model, model.folder)
    model.derived_from = origin(model, facts.record)
    files, card = {}, None if facts.changed else hand_written_card(model.folder)
    card = card or card_text(model, facts, repo_id, cohort)
    own = not facts.changed and model.folder is not None and target.is_dir() and model.folder.samefile(target)
    if not own:
        if (target / "run.json").is_file() and not run_record(target).get("published"):
            raise CardError(f"{target}: found a run of other weights, whose results and record would be lost, expected "
                            "another folder; choose one")
        target.mkdir(parents=True, exist_ok=True)
        files = facts.files()
    others = () if own else SIDECARS
    check_names(target, *BEST_FILES[:2], *others)
    is_listed = (target / WRITTEN).is_file()  # as in a run
    with listing(target, *BEST_FILES[:2], *others) if is_listed else nullcontext():
        for name in others:
            path = target / name
            if path.is_file() and path.read_bytes() != files.get(name, "").encode():
                path.unlink()
        if read_card(target) != card:
            discard_card(target)
        model._save_pretrained(target)
        for name, content in files.items():
            with replacing(target / name) as path:
                path.write_text(content, encoding="utf-8", newline="\n")
    write_card(target, card)


def write_card(folder: Path, card: str) -> bool:
    """README.md in the folder, unless there is one that a person wrote; -> whether it was written."""
    if hand_written_card(folder) is not None:
        return False
    with replacing(folder / CARD) as temporary:
        temporary.write_text(card, encoding="utf-8")
    return True


# ---- to the hub


def push_run(run: str | Path, repo_id: str, private: bool = True, cohort: str | None = None) -> str:
    """`save_with_card` of a run, to the hub in one commit; -> the commit's address.

    Files there that belong to other weights are deleted. A card that a person wrote there is replaced by one that a
    person wrote in the run's folder, never by a generated one. Raises HubError (one line, the token in none) for
    whatever the hub or the way to it does not do. A public repository is not written to with `private`.
    """
    if repo_id.count("/") != 1:
        found = f"found {repo_id!r}, expected USER/NAME as the hub has it, such as jane/ct-findings"
        raise HubError(found, "correct it", kind="access")
    token = find_token(f"make one with write access ({TOKENS_PAGE}), set HF_TOKEN to it, {AGAIN}")
    model = load_model(run, "cpu")
    logging.set_verbosity_error()
    api = HfApi(token=token)
    own = model.folder
    generated = own is None or hand_written_card(own) is None or not unchanged(model, own)
    try:
        if private and _is_public(api, repo_id):
            found = f"{repo_id} is there already, and public"
            raise HubError(found, "push to another name, or say --public", kind="access")
        with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as theirs:
            if generated and api.file_exists(repo_id, CARD):
                api.hf_hub_download(repo_id, CARD, local_dir=theirs)
            api.create_repo(repo_id, private=private, exist_ok=True)
            save_with_card(model, folder, repo_id, cohort)
            return str(api.upload_folder(
                repo_id=repo_id, folder_path=folder, commit_message="Model, card and thresholds",
                ignore_patterns=[CARD] if hand_written_card(Path(theirs)) else None, delete_patterns=list(SIDECARS),
            ))
    except UserError:
        raise
    except Exception as error:
        raise to_push_error(error, repo_id, token) from error


def _is_public(api: HfApi, repo_id: str) -> bool:
    try:
        return not api.model_info(repo_id).private
    except RepositoryNotFoundError:  # or the token is refused, which creating it will tell
        return False


def to_push_error(error: Exception, repo_id: str, token: str) -> HubError:
    """`to_hub_error`, in the words of somebody who uploads."""
    refused = unwrapped(error)
    if not isinstance(refused, HfHubHTTPError) or not is_hub_url(str(refused.response.url)):
        return to_hub_error(error, repo_id, token)
    status = refused.response.status_code
    if status in (400, 409, 412, 422):
        said = (refused.server_message or "no reason given").replace(token, "***").splitlines()[0]
        return HubError(f"the hub did not take the files ({status}): {said[:200]}", "run this again", kind="hub")
    if status == 403:
        found = f"the hub lets this token write nothing to {repo_id} (403): it is somebody's, or the token only reads"
        remedy = f"name a repository of your own, or take a token with write access ({TOKENS_PAGE}), {AGAIN}"
        return HubError(found, remedy, kind="access")
    return to_hub_error(error, "such model", token, repo_id if status == 404 else REPOSITORY)
