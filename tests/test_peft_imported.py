"""PEFT imported before headstart, after it, in threads and again: its steps are extended, and it is PEFT to all."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import threading

import peft
import pytest
import torch
from transformers import Trainer

from conftest import logits, perturb, started, tiny_llama, token_batch
from headstart import _imports
from test_resume import arguments, rows, weights

EXTENDED = """
import sys
sys.path.insert(0, {tests!r})
def extended():
    from headstart import compat
    places = [compat.find(step)[2] for step in compat.STEPS]
    return all(getattr(getattr(place, "__func__", place), "extended_by_headstart", False) for place in places)
"""
ORDERS = {
    "before": "import peft\nimport headstart",
    "a part of it, after": "import headstart\nfrom peft.tuners.lora.layer import LoraLayer",
    "by headstart": "from headstart import initialize_",
}


@pytest.fixture
def run(fresh, request):
    """A function that runs a program, which can ask whether PEFT is extended."""
    return lambda program: fresh.run(EXTENDED.format(tests=str(request.path.parent)) + program)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a base model, a trained anchored adapter, its logits, and those of the base."""
    folder = tmp_path_factory.mktemp("saved")
    tiny_llama().save_pretrained(folder / "base")
    model = started(tiny_llama(), "pissa")
    perturb(model)
    model.save_pretrained(folder / "adapter")
    torch.save({"batch": token_batch(), "logits": logits(model, token_batch())}, folder / "expected.pt")
    return folder


@pytest.mark.parametrize("order", ORDERS)
def test_anchors_are_loaded_by_peft_alone(order, saved, run):
    program = f"""
{ORDERS[order]}
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
assert extended()
expected = torch.load({str(saved / "expected.pt")!r})
base = AutoModelForCausalLM.from_pretrained({str(saved / "base")!r})
model = PeftModel.from_pretrained(base, {str(saved / "adapter")!r}).eval()
with torch.no_grad():
    assert torch.equal(model(**expected["batch"]).logits, expected["logits"])
"""
    run(program)


def test_a_trainer_resumes_in_a_program_that_only_imports_headstart(tmp_path, run):
    tiny_llama().save_pretrained(tmp_path / "base")
    whole = Trainer(started(tiny_llama(), "pissa"), arguments(tmp_path / "run"), train_dataset=rows())
    whole.train()
    torch.save({"rows": rows(), "weights": weights(whole.model)}, tmp_path / "whole.pt")
    program = f"""
import headstart
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
whole = torch.load({str(tmp_path / "whole.pt")!r})
settings = torch.load({str(tmp_path / "run" / "checkpoint-4" / "training_args.bin")!r}, weights_only=False)
settings.output_dir = {str(tmp_path / "rest")!r}
base = AutoModelForCausalLM.from_pretrained({str(tmp_path / "base")!r})
config = LoraConfig.from_pretrained({str(tmp_path / "run" / "checkpoint-4")!r})
config.init_lora_weights, config.inference_mode = True, False
rest = Trainer(get_peft_model(base, config), settings, train_dataset=whole["rows"])
rest.train(resume_from_checkpoint={str(tmp_path / "run" / "checkpoint-4")!r})
trained = {{name: value for name, value in rest.model.named_parameters() if "lora_" in name}}
assert trained.keys() == whole["weights"].keys()
for name, value in trained.items():
    assert torch.equal(value, whole["weights"][name]), name
"""
    run(program)


def test_peft_is_found_and_read_as_without_headstart(run):
    program = """
import importlib.metadata, importlib.resources, importlib.util, inspect, pkgutil
from importlib.machinery import PathFinder, SourceFileLoader
import headstart
plain, spec = PathFinder.find_spec("peft"), importlib.util.find_spec("peft")
assert "peft" not in sys.modules
assert (spec.name, spec.origin, spec.cached) == (plain.name, plain.origin, plain.cached)
assert list(spec.submodule_search_locations) == list(plain.submodule_search_locations)
assert spec.loader.get_source("peft") == plain.loader.get_source("peft")
assert pkgutil.get_data("peft", "__init__.py") == plain.loader.get_data(plain.origin)
import peft
assert type(peft.__spec__.loader) is type(peft.__loader__) is SourceFileLoader
assert importlib.util.find_spec("peft") is peft.__spec__
assert "LoraConfig" in inspect.getsource(peft) and importlib.resources.files("peft").joinpath("tuners").is_dir()
assert extended()
"""
    run(program)


def test_peft_imported_again_is_extended_again(run):
    program = """
import importlib
import headstart, peft
importlib.reload(peft)
assert extended()
importlib.reload(headstart)
assert sum(type(finder).__name__ == "_PeftFinder" for finder in sys.meta_path) == 1
for name in [name for name in sys.modules if name.partition(".")[0] == "peft"]:
    del sys.modules[name]
import peft as another
assert another is not peft and extended()
"""
    run(program)


def test_threads_that_import_at_once_find_it_extended(run):
    program = """
import threading
sys.setswitchinterval(1e-5)
import transformers  # which threads can't import at once
ready, failed, first = threading.Barrier(6), [], []
def work(text):
    ready.wait()
    try:
        exec(text)
        first.append(extended())
    except BaseException as error:
        failed.append(error)
texts = ["import peft", "from headstart import save_lora", "import headstart; headstart.initialize_"]
threads = [threading.Thread(target=work, args=(text,)) for text in 2 * texts]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert failed == [] and first == [True] * 6, (failed, first)
"""
    run(program)


CHANGED = """
import warnings
from importlib.machinery import PathFinder, SourceFileLoader
class Changed(SourceFileLoader):
    def exec_module(self, module):
        super().exec_module(module)
        del module.LoraModel._check_add_weighted_adapter
class Finder:
    @staticmethod
    def find_spec(name, path, target=None):
        spec = PathFinder.find_spec(name, path, target)
        if name == "peft":
            spec.loader = Changed(name, spec.origin)
        return spec if name == "peft" else None
sys.meta_path.insert(0, Finder)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import headstart
    from headstart.errors import HeadstartWarning
    def sentences():
        return [str(each.message) for each in caught if issubclass(each.category, HeadstartWarning)]
    assert sentences() == []
    import peft
    assert len(sentences()) == 1 and "add_weighted_adapter isn't refused" in sentences()[0], sentences()
"""


def test_a_changed_peft_warns_when_it_is_imported_and_loads(saved, run):
    program = f"""
{CHANGED}
import torch
from transformers import AutoModelForCausalLM
expected = torch.load({str(saved / "expected.pt")!r})
base = AutoModelForCausalLM.from_pretrained({str(saved / "base")!r})
model = peft.PeftModel.from_pretrained(base, {str(saved / "adapter")!r}).eval()
with torch.no_grad():
    assert torch.equal(model(**expected["batch"]).logits, expected["logits"])
"""
    run(program)


class Finder:
    """Finds one spec, whatever it is asked for."""

    def __init__(self, spec):
        self.spec = spec

    def find_spec(self, name, path, target=None):
        return self.spec


def finders(monkeypatch, *before, after):
    finder = _imports._PeftFinder(lambda: pytest.fail("nothing was imported"))
    monkeypatch.setattr(sys, "meta_path", [*before, finder, *after])
    return finder


def test_only_peft_is_found_and_only_by_those_behind(monkeypatch):
    plain = importlib.util.spec_from_loader("peft", importlib.machinery.SourceFileLoader("peft", peft.__file__))
    finder = finders(monkeypatch, Finder("asked twice"), after=[object(), Finder(None), Finder(plain), Finder("late")])
    assert finder.find_spec("peft.tuners", None) is None and finder.find_spec("torch", None) is None
    assert finder.find_spec("peft", None) is plain
    assert finders(monkeypatch, after=[Finder(None)]).find_spec("peft", None) is None
    monkeypatch.setattr(sys, "meta_path", [Finder(plain)])  # a stranger's, which asks the one that it replaced
    assert finder.find_spec("peft", None) is None


def test_a_folder_of_that_name_is_left_alone(monkeypatch):
    folder = importlib.machinery.ModuleSpec("peft", None, is_package=True)
    assert finders(monkeypatch, after=[Finder(folder)]).find_spec("peft", None) is folder
    assert folder.loader is None


def test_a_peft_that_another_thread_imports_is_waited_for(monkeypatch):
    """Half-imported, its steps would seem to be missing."""
    order, began, go_on = [], threading.Event(), threading.Event()

    class Slow(importlib.abc.Loader):
        def create_module(self, spec):
            return None

        def exec_module(self, module):
            began.set()
            assert go_on.wait(30)
            order.append("imported")

    slow = importlib.util.spec_from_loader("peft", Slow())
    monkeypatch.delitem(sys.modules, "peft")
    monkeypatch.setattr(sys, "meta_path", [Finder(slow)])
    importing = threading.Thread(target=__import__, args=("peft",))
    importing.start()
    assert began.wait(30)
    threading.Timer(0.2, go_on.set).start()
    _imports.after_peft(lambda: order.append("extended"))
    importing.join()
    assert order == ["imported", "extended"]


def test_a_peft_that_fails_in_another_thread_is_no_fault_of_headstart(monkeypatch):
    began, go_on = threading.Event(), threading.Event()

    class Failing(importlib.abc.Loader):
        def create_module(self, spec):
            return None

        def exec_module(self, module):
            began.set()
            assert go_on.wait(30)
            raise RuntimeError("no such library")

    def fails():
        with pytest.raises(RuntimeError, match="no such library"):
            importlib.import_module("peft")

    failing = importlib.util.spec_from_loader("peft", Failing())
    monkeypatch.delitem(sys.modules, "peft")
    monkeypatch.setattr(sys, "meta_path", [Finder(failing)])
    importing = threading.Thread(target=fails)
    importing.start()
    assert began.wait(30)
    threading.Timer(0.2, go_on.set).start()
    _imports.after_peft(lambda: pytest.fail("nothing was imported"))
    importing.join()
    assert any(isinstance(finder, _imports._PeftFinder) for finder in sys.meta_path)
