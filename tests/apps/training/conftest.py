"""What is trained on."""

import dataclasses

import pytest

from dd_kernels.apps import data


@pytest.fixture(scope="session")
def images():
    return dataclasses.replace(data.digits(), images=data.digits().images[:20], labels=data.digits().labels[:20])
