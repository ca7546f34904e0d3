"""What the tests of generation share."""

import pytest

from mmcore.generation import sampling


@pytest.fixture(params=["in turn", "ahead"])
def ahead(request, monkeypatch):
    """Whether sessions read a drawn token before they give it out, as on a GPU."""
    monkeypatch.setattr(sampling, "ASYNCHRONOUS", ("cpu",) if request.param == "ahead" else ())
    return request.param == "ahead"
