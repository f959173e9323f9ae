"""docs/reference says what the code says."""

import json
import re

import pytest
import yaml

from modelcache_api.resource import ModelCache
from support.reference import FOLDER, documents, updated


@pytest.mark.parametrize("document", documents(), ids=lambda path: path.name)
def test_the_generated_parts_are_up_to_date(document):
    text = document.read_text()
    assert "<!-- generated: " in text
    assert updated(text) == text, "run: PYTHONPATH=tests python -m support.reference"


@pytest.mark.parametrize("document", ["resource.md", "../truss.md"])
def test_every_manifest_in_the_documents_is_valid_and_uses_no_unknown_field(document):
    blocks = re.findall(r"```yaml\n(.*?)```", (FOLDER / document).read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        value = yaml.safe_load(block)
        model = ModelCache.model_validate(value, context={"cluster": True})
        again = json.loads(model.model_dump_json(by_alias=True, exclude_unset=True))
        assert again["spec"] == value["spec"]
