"""Upload a model's folder to the Hugging Face hub."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from zero_sft.errors import ExportError


def make_repository(name: str, *, private: bool | None, token: str | bool | None = None) -> str:
    """Create a model repository if it does not exist. Return its full id, such as "org/model". Asks the hub.

    Args:
        name: the id, or the name of a repository of the token's owner.
        private: of a new repository; None: the hub's setting for its owner.

    Raises:
        ExportError: the hub can't be reached, or the token may not write there.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    with _explain_errors(name):
        repository = api.create_repo(name, private=private, exist_ok=True, repo_type="model").repo_id
        api.auth_check(repository, repo_type="model", write=True)  # a public repository of others exists as well
        return repository


def upload(folder: Path, repository: str, message: str, names: Sequence[str], token: str | bool | None = None) -> str:
    """Upload files of the folder in one commit, and return the repository's address.

    Args:
        names: the files, by path in the folder. No other file leaves this machine.

    Raises:
        ExportError: the hub can't be reached, or refuses.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    with _explain_errors(repository):
        api.upload_folder(
            repo_id=repository, folder_path=folder, commit_message=message, allow_patterns=list(names), repo_type="model"
        )
    return f"{api.endpoint}/{repository}"


@contextlib.contextmanager
def _explain_errors(repository: str) -> Iterator[None]:
    """Turn an error of huggingface_hub into an ExportError that names the remedy."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    try:
        yield
    except HFValidationError as error:
        raise ExportError(
            f"{repository!r} can't be the name of a repository on the hub: {error}. Give one as org/model.",
            code="hub.bad_repository_name",
        ) from error
    except (HfHubHTTPError, LocalTokenNotFoundError) as error:
        status = error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else None
        is_refused = status in (401, 403) or isinstance(error, LocalTokenNotFoundError)
        remedy = (
            "Give a token that may write there: HF_TOKEN in the environment, or `hf auth login`."
            if is_refused
            else "Check the connection to the hub."
        )
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ExportError(
            f"the hub does not take {repository!r}: {reason}. {remedy}",
            code="hub.upload_refused" if is_refused else "hub.unavailable",
        ) from error
    except Exception as error:  # the errors of its HTTP library, which changes between releases
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ExportError(
            f"{repository!r} can't be reached on the hub: {reason.rstrip('.')}. Check the connection.", code="hub.unavailable"
        ) from error
