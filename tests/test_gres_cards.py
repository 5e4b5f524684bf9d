"""The cards of the metrics: every example runs, the page answers, and each folder is a Space of its own."""

import doctest
import json
import re
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import evaluate
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1] / "evaluate"


def metric_of(name: str) -> evaluate.Metric:
    return evaluate.load(str(ROOT / name), keep_in_memory=True)


@pytest.mark.parametrize("name", ["gres", "grec", "jf"])
def test_card_examples_run(name):
    card = ROOT / name / "README.md"
    failed, tried = doctest.testfile(str(card), module_relative=False, globs={"metric": metric_of(name)})
    assert (failed, tried > 5) == (0, True)


@pytest.mark.parametrize("name", ["gres", "grec", "jf"])
def test_card_and_help_have_every_mode(name):
    metric = metric_of(name)
    table, modes = metric.modes_table(), metric.modes
    assert table in (ROOT / name / "README.md").read_text(), "put the text of metric.modes_table() into the card"
    assert table.count("\n") == 2 + len(modes)
    assert all(f"| `{mode}` |" in table and mode in metric.inputs_description for mode in modes)


def test_shared_files_are_identical():
    copies = [folder / "sentence_rows.py" for folder in ROOT.iterdir() if (folder / "app.py").exists()]
    assert len(copies) == 3
    assert len({copy.read_bytes() for copy in copies}) == 1
    assert len({(ROOT / name / "run_lengths.py").read_bytes() for name in ("gres", "jf")}) == 1


@pytest.mark.parametrize("name", ["gres", "grec", "jf"])
def test_docstring_examples_run(name):
    metric = metric_of(name)
    test = doctest.DocTestParser().get_doctest(metric.inputs_description, {"metric": metric}, name, None, None)
    assert len(test.examples) > 1
    assert doctest.DocTestRunner().run(test).failed == 0


@pytest.mark.parametrize("name", ["gres", "grec", "jf"])
def test_folder_is_a_space(name):
    header = yaml.safe_load((ROOT / name / "README.md").read_text().split("---")[1])
    assert header["app_file"] == "app.py" and set(header["tags"]) == {"evaluate", "metric"}
    asked = {re.split("[>=]", line)[0] for line in (ROOT / name / "requirements.txt").read_text().split()}
    imported = set()
    for file in (ROOT / name).glob("*.py"):
        if file.name != "app.py":
            imported |= set(re.findall(r"^\s*(?:import|from) (\w+)", file.read_text(), re.MULTILINE))
    assert imported & {"numpy", "pycocotools", "datasets", "evaluate", "matplotlib"} <= asked
    assert not imported & {"grefcoco", "modeling", "train"}


PAGES = [("gres", "rela", "gIoU"), ("grec", "published", "F1_score"), ("jf", "published", "J&F")]


@pytest.mark.parametrize(("name", "option", "key"), PAGES)
def test_page_scores_its_examples(name, option, key):
    gradio = pytest.importorskip("gradio")
    spec = spec_from_file_location(f"{name}_app", ROOT / name / "app.py")
    app = module_from_spec(spec)
    spec.loader.exec_module(app)
    result = app.score(json.dumps(app.PREDICTIONS), json.dumps(app.REFERENCES), option)
    assert result[key] == (100 if name == "gres" else 1)
    with pytest.raises(gradio.Error):
        app.score("[{}]", json.dumps(app.REFERENCES[:1]), option)
