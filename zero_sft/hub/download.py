"""Download a repository's files with huggingface_hub, and turn its errors into one sentence with a remedy."""

from pathlib import Path

from zero_sft.errors import CheckpointError
from zero_sft.hub.options import HubOptions


def download_snapshot(repo: str, options: HubOptions, patterns: tuple[str, ...], *, local_only: bool) -> Path:
    """Download the files that match `patterns`; with `local_only`, find them in the cache. Any rank; does not communicate.

    Raises:
        CheckpointError: the hub can't provide them.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    prefix = f"{options.subfolder.rstrip('/')}/" if options.subfolder else ""
    try:
        folder = snapshot_download(
            repo,
            revision=options.revision,
            cache_dir=options.cache_dir,
            token=options.token,
            local_files_only=options.local_files_only or local_only,
            allow_patterns=[prefix + pattern for pattern in patterns],
        )
    except HFValidationError as error:
        raise CheckpointError(
            f"{repo!r} is neither an existing folder nor a hub id ('org/model'): {error}", code="hub.not_found"
        ) from error
    except (OSError, ValueError) as error:
        raise _unavailable(repo, options, error) from error
    return Path(folder)


def _unavailable(repo: str, options: HubOptions, error: Exception) -> CheckpointError:
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    if isinstance(error, GatedRepoError):
        return CheckpointError(
            f"the model {repo!r} is gated: accept its terms on the hub, and give a token that may read it (HF_TOKEN in the "
            "environment, or `hf auth login`).",
            code="hub.gated",
        )
    if isinstance(error, RevisionNotFoundError):
        return CheckpointError(
            f"the model {repo!r} has no revision {options.revision!r}. Check --revision: a branch, a tag or a commit's hash.",
            code="hub.no_such_revision",
        )
    if isinstance(error, RepositoryNotFoundError):
        return CheckpointError(
            f"no local folder {repo!r}, and no such model on the Hugging Face hub, or it is private and needs a token "
            "(HF_TOKEN). Check --model_name_or_path.",
            code="hub.no_such_model",
        )
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return CheckpointError(
        f"can't get the model {repo!r} from the Hugging Face hub: {reason}\nIf this machine has no internet, download the "
        "model elsewhere and name its local folder: --model_name_or_path /path/to/the/folder",
        code="hub.unavailable",
    )
