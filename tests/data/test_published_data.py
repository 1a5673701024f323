"""Data sets in the shapes that they are published in: what is trained on in each, or why it is refused."""

import pytest

from tests.data import tiny
from tests.errors import raises
from tests.published.data import DATA, write
from zero_sft.data.tokenize import TokenizedSample


@pytest.mark.parametrize("name", DATA)
def test_trained_on_as_its_publisher_means_it_or_refused(name, tmp_path):
    tokenizer, expected = tiny.byte_tokenizer(tiny.CHATML), DATA[name]
    path = write(name, tmp_path)
    if expected.answers is None:
        with raises(*expected.refused):
            tiny.prepare(path, tokenizer, model_max_length=4096)
        return
    (row,) = tiny.prepare(path, tokenizer, model_max_length=4096).rows
    texts = tiny.trained_text(TokenizedSample(input_ids=row["input_ids"], labels=row["labels"], trained_tokens=0), tokenizer)
    assert tuple(text.removesuffix("<|im_end|>").removesuffix("</s>") for text in texts) == expected.answers
