"""Every shape of sample with every template: trained on as it is meant, or refused with a known reason."""

import pytest

from tests.data import shapes


@pytest.mark.parametrize("shape", shapes.SHAPES)
def test_each_shape_with_each_template(shape):
    for model in shapes.MODELS:
        result = shapes.outcome(model, shape)
        assert result.startswith(shapes.TRAINED) or result in shapes.REASONS, (model, result)


def test_the_table_in_the_document():
    """`python -m tests.data.shapes` writes it."""
    assert shapes.in_document(shapes.DOCUMENT.read_text()) == shapes.table()
