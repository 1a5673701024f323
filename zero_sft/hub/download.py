"""Download a repository's files with huggingface_hub, and turn its errors into one sentence with a remedy."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from zero_sft.errors import CheckpointError
from zero_sft.hub.options import HubOptions


def download_snapshot(repo: str, options: HubOptions, patterns: tuple[str, ...], *, local_only: bool) -> Path:
    """Download the files that match `patterns`; with `local_only`, find them in the cache. Any rank; does not communicate.

    Raises:
        CheckpointError: the hub can't provide them.
    """
    from huggingface_hub import snapshot_download

    prefix = f"{options.subfolder.rstrip('/')}/" if options.subfolder else ""
    with _explain_errors(repo, options.revision):
        folder = snapshot_download(
            repo,
            revision=options.revision,
            cache_dir=options.cache_dir,
            token=options.token,
            local_files_only=options.local_files_only or local_only,
            allow_patterns=[prefix + pattern for pattern in patterns],
        )
    return Path(folder)


@contextlib.contextmanager
def _explain_errors(repo: str, revision: str | None) -> Iterator[None]:
    """Turn an error of huggingface_hub into a CheckpointError that names the remedy."""
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        yield
    except HFValidationError as error:
        raise CheckpointError(
            f"{repo!r} is neither an existing folder nor a hub id ('org/model'): {error}", code="hub.not_found"
        ) from error
    except GatedRepoError as error:
        raise CheckpointError(
            f"the model {repo!r} is gated: accept its terms on the hub, and give a token that may read it (HF_TOKEN in the "
            "environment, or `hf auth login`).",
            code="hub.gated",
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointError(
            f"the model {repo!r} has no revision {revision!r}. Check --revision: a branch, a tag or a commit's hash.",
            code="hub.no_such_revision",
        ) from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"no local folder {repo!r}, and no such model on the Hugging Face hub, or it is private and needs a token "
            "(HF_TOKEN). Check --model_name_or_path.",
            code="hub.no_such_model",
        ) from error
    except (OSError, ValueError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise CheckpointError(
            f"can't get the model {repo!r} from the Hugging Face hub: {reason}\nIf this machine has no internet, download the "
            "model elsewhere and name its local folder: --model_name_or_path /path/to/the/folder",
            code="hub.unavailable",
        ) from error
