import pytest
from digits import QUICK, digits

from jcdp_diffusers.victims import train_victim


@pytest.fixture(scope="session")
def train():
    return digits(0, 100)


@pytest.fixture(scope="session")
def test():
    return digits(100, 200)


@pytest.fixture(scope="session")
def result(train, test):
    return train_victim(train, test, recipe=QUICK, seed=3)
