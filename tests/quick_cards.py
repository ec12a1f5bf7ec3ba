"""What makes the tests of trainings shorter; the `conftest.py` of each of their folders takes it over."""

import functools

import jinja2
import pytest


@pytest.fixture(scope="module", autouse=True)
def template_of_cards_is_compiled_once():
    """Each training writes a card, whose template takes longer to compile than some of these trainings."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jinja2.Environment, "compile", functools.cache(jinja2.Environment.compile))
        yield
