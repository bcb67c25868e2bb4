"""Documents that are to be kept apart in a model that cannot: OPT counts positions itself."""

import pytest

from factories import model_folder
from features import stages_with
from scionlm.core.errors import UsageError
from scionlm.recipes.inputs import open_inputs
from scionlm.recipes.presets import load_recipe
from scionlm.recipes.run import run_recipe
from whole_runs import SETTINGS, recipe_of


@pytest.fixture(scope="module")
def opt(tmp_path_factory):
    return model_folder(tmp_path_factory.mktemp("models") / "opt", model_type="opt")


MASK = {"document_mask": True}
RECIPES = {
    "the run": {"data.document_mask": True},
    "a stage": {"stages": stages_with("keep", data=MASK)},
}


def refused(recipe, out):
    with pytest.raises(UsageError, match=r"data\.document_mask: opt models do not keep documents apart"):
        run_recipe(recipe, out)
    assert not out.exists()


@pytest.mark.parametrize("name", RECIPES)
def test_a_source_that_cannot_keep_documents_apart_is_refused_and_another_is_not(
    opt, tiny_folder, data_folder, tmp_path, name
):
    settings = {key.replace(".", "__"): value for key, value in RECIPES[name].items()}
    refused(recipe_of(opt, data_folder.path, **settings), tmp_path / "opt")
    inputs = open_inputs(recipe_of(tiny_folder, data_folder.path, **settings), tmp_path / "llama")
    assert any(one.stage.data.document_mask for one in inputs.stages)
    assert open_inputs(recipe_of(opt, data_folder.path), tmp_path / "plain").stages


def test_so_is_a_teacher_that_cannot(opt, tiny_folder, data_folder, tmp_path):
    taught = recipe_of(tiny_folder, data_folder.path, data__document_mask=True, distill={"teacher": str(opt)})
    refused(taught, tmp_path / "run")


def test_so_is_a_source_that_cannot_while_it_is_pruned(opt, data_folder, tmp_path):
    prune = {"method": "masks", "steps": 6, "data": MASK}
    settings = {key: value for key, value in SETTINGS.items() if not key.startswith("inherit")}
    settings |= {"source": str(opt), "data.dir": str(data_folder.path), "target": {"num_hidden_layers": 3}}
    refused(load_recipe("shear", settings | {"prune": prune}), tmp_path / "run")
