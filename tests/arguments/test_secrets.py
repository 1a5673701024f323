"""A token of the hub is in no message, whatever is wrong with the file that it stands in."""

import pytest

from tests.errors import raises
from zero_sft.arguments import parse
from zero_sft.errors import ConfigError, without_tokens

SECRET = "hf_SECRETSECRET"
FILES = {
    "a list": (f"token: [{SECRET}]", "arguments.wrong_value"),
    "a mapping": (f"token: {{a: {SECRET}}}", "arguments.wrong_value"),
    "under its former name": (f"use_auth_token: [{SECRET}]", "arguments.wrong_value"),
    "an open quote": (f'token: "{SECRET}', "arguments.file_not_yaml"),
    "a second colon": (f"token: {SECRET}: x", "arguments.file_not_yaml"),
    "a tag": (f"token: !{SECRET} x", "arguments.file_not_yaml"),
    "an alias": (f"token: *{SECRET}", "arguments.file_not_yaml"),
    "no colon": (f"token {SECRET}", "arguments.file_not_an_object"),
    "white space inside": (f"token: {SECRET} and more", "arguments.bad_token"),
    "a character that no header takes": (f"token: {SECRET}é", "arguments.bad_token"),
}


@pytest.mark.parametrize("case", FILES)
def test_no_message_shows_a_token(tmp_path, case):
    content, code = FILES[case]
    (tmp_path / "run.yaml").write_text(content, encoding="utf-8")
    with raises(code) as caught:
        parse([str(tmp_path / "run.yaml")])
    assert "SECRET" not in str(caught.value)


def test_a_token_in_a_block_of_text_is_taken_without_its_line_end(tmp_path):
    (tmp_path / "run.yaml").write_text(f"token: |\n  {SECRET}\n")
    assert parse([str(tmp_path / "run.yaml")]).model.token == SECRET


def test_messages_of_other_libraries_lose_their_tokens():
    text = f"Illegal header value b'Bearer {SECRET}\\n'"
    assert without_tokens(text) == "Illegal header value b'Bearer hf_***\\n'"
    assert ConfigError(text, code="hub.unavailable").with_code.endswith("hf_***\\n' [hub.unavailable]")
