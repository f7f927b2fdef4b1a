"""Folders to the model hub, with the token of the user."""

from pathlib import Path

from mogb_diffusion.errors import InputError


def check_hub(repo: str | None) -> str:
    """The name of a repository, if there is a token to write to it; nothing is sent.

    Raises:
        InputError: No name, none that the hub takes, no token, or no huggingface_hub.
    """
    try:
        import huggingface_hub
        from huggingface_hub.utils import validate_repo_id
    except ImportError:
        raise InputError("--to hub needs huggingface_hub. Install it with: pip install 'mogb[diffusion]'") from None
    if not repo:
        raise InputError("--to hub needs the name of a repository: --repo USER/NAME.")
    try:
        validate_repo_id(repo)
    except ValueError as error:
        raise InputError(f"--repo {repo}: {' '.join(str(error).split())}") from None
    if not huggingface_hub.get_token():
        raise InputError("--to hub needs a token of yours: log in with 'hf auth login', or set HF_TOKEN.")
    return repo


def upload(folder: Path, repo: str, *, private: bool, message: str) -> str:
    """Sends a folder to a repository, which is made if there is none; returns its address.

    Raises:
        ConnectionError: The hub cannot be reached, or refuses.
    """
    import huggingface_hub

    try:
        api = huggingface_hub.HfApi()
        made = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=made.repo_id, folder_path=str(folder), commit_message=message)
    except Exception as error:  # of the hub's client and of whichever HTTP library it has
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ConnectionError(
            f"{folder} is ready, but {repo} could not be written: {reason.rstrip('.')}. Send it later with: "
            f"hf upload {repo} {folder}"
        ) from error
    return str(made)
