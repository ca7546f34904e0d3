"""What the tests of generation share."""

import pytest

from mmcore.generation import sampling
from tests.generation.fakes import FakeModel


@pytest.fixture(params=["in turn", "ahead", "unseen"])
def ahead(request, monkeypatch):
    """Whether sessions read a drawn token before they give it out, as on a GPU; "unseen": before they know it, too."""
    monkeypatch.setattr(sampling, "ASYNCHRONOUS", () if request.param == "in turn" else ("cpu",))
    monkeypatch.setattr(FakeModel, "takes_back", lambda *_: request.param == "unseen")
    return request.param != "in turn"
