"""What every countermeasure must be, whatever its method: parametrised over the registry."""

import pytest

from jcdp_diffusers import countermeasures
from jcdp_diffusers.countermeasures import KINDS


@pytest.mark.parametrize("name", countermeasures.NAMES)
def test_names_itself_its_source_and_its_cost(name):
    measure = countermeasures.get(name)
    assert measure.name == name and measure.kind in KINDS and measure.source and measure.cost


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="countermeasure is 'prayer', but accepted are none, eclipse, gray, .*joined by '\\+'"):
        countermeasures.get("gray+prayer")
