"""One text file of the user's, read whole, or one clear error."""

from pathlib import Path

from zero_sft.errors import DataError


def read_text(path: Path, *, expected: str, argument: str) -> str:
    """The file's text, UTF-8 with or without a byte order mark. Any rank by itself; does not communicate.

    `expected` says what should be in it, `argument` which argument named it; both for the message.

    Raises:
        DataError: no such file, a folder, not UTF-8, or nothing in it.
    """
    if path.is_dir():
        raise DataError(f"{path} is a folder; expected a file: {expected}. Name the file itself.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise DataError(f"no such file: {path}. Check {argument}.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: {error}. Save it as UTF-8.") from error
    except OSError as error:
        raise DataError(f"{path} can't be read: {error.strerror or error}. Check {argument}.") from error
    if not text.strip():
        raise DataError(f"{path} is empty; expected {expected}.")
    return text
