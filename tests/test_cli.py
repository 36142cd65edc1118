"""The command line as a user meets it: real processes for exit codes, the functions behind for the rest."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import headstart as hs
from conftest import logits, tiny_llama, token_batch, word_tokenizer
from headstart.cli import main
from headstart.cli.compare import split_methods
from headstart.cli.methods import describe
from headstart.cli.options import target_modules
from headstart.methods import method_names

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with a tiny random Llama and a tokenizer of digits and a few words."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_llama(max_position_embeddings=128).save_pretrained(folder)
    words = ["<pad>", "<eos>", "<unk>", "Question", ":", "Answer", "#", "+", "=", ".", "is", "?", "what"]
    words += [str(number) for number in range(70)]
    word_tokenizer(words).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sums(tmp_path_factory):
    """A folder with questions that can be graded."""
    folder = tmp_path_factory.mktemp("data") / "sums"
    folder.mkdir()
    for split, count in (("train", 24), ("test", 6)):
        lines = [
            json.dumps(
                {"question": f"what is {i} + {i + 1} ?", "answer": f"{i} + {i + 1} = {2 * i + 1} .\n#### {2 * i + 1}"}
            )
            for i in range(count)
        ]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def run(capsys, *arguments):
    """Run in this process; return (exit code, standard output, standard error)."""
    code = 0
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def small(tiny, sums, out, *more):
    return (
        "compare", tiny, "--data", sums, "--out", out, "--steps", 4, "--batch-size", 4, "--rank", 2,
        "--held-out-examples", 4, "--graded-examples", 2, "--max-new-tokens", 3, *more,
    )  # fmt: skip


def cells(out):
    """The folders of a study's cells by the method of their start."""
    places = [path.parent for path in (out / "cells").glob("*/run.json")]
    return {json.loads((place / "run.json").read_text())["settings"]["start"]["method"]: place for place in places}


def results(out):
    return {method: json.loads((place / "result.json").read_text()) for method, place in cells(out).items()}


def test_methods_lists_every_method(capsys):
    code, out, _ = run(capsys, "methods")
    assert code == 0
    for name in hs.method_names():
        assert re.search(rf"^{re.escape(name)}\s", out, re.M), name
    code, out, _ = run(capsys, "methods", "--json")
    assert [row["name"] for row in json.loads(out)] == hs.method_names()
    code, out, _ = run(capsys, "methods", "lora-one")
    assert "gamma" in out
    assert "Algorithm 1" in out
    code, out, _ = run(capsys, "methods", "lora-sb")
    for each in ("needs: gradient", "cost: ", "lr=None", "split=orthonormal"):
        assert each in out


@pytest.mark.parametrize("base", ["anchored", "residual"])
def test_init_export_inspect(base, tiny, sums, tmp_path, capsys):
    code, out, err = run(
        capsys, "init", tiny, "--method", "pissa", "--out", tmp_path / "start", "--rank", 2, "--base", base
    )
    assert code == 0, err
    assert "wrote" in out
    model = hs.load_checkpoint(AutoModelForCausalLM.from_pretrained(tiny), tmp_path / "start")
    batch = token_batch()
    expected = logits(AutoModelForCausalLM.from_pretrained(tiny), batch)
    assert torch.allclose(logits(model, batch), expected, atol=1e-5)
    # Moved as by training, so that what is exported is not nothing.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01)
    hs.save_checkpoint(model, tmp_path / "trained")
    expected = logits(model, batch)

    code, out, err = run(capsys, "inspect", tmp_path / "trained", "--model", tiny)
    assert code == 0, err
    assert base in out
    assert "it fits" in out
    code, out, _ = run(capsys, "inspect", tmp_path / "trained", "--json")
    description = json.loads(out)
    assert len(description["layers"]) == 14
    assert len(description["layers"][0]["singular_values"]) == 4

    code, out, err = run(capsys, "export", tmp_path / "trained", "--to", "lora", "--out", tmp_path / "plain")
    assert code == 0, err
    from peft import PeftModel

    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), tmp_path / "plain")
    assert torch.allclose(logits(plain, batch), expected, atol=1e-5)
    code, out, err = run(capsys, "export", tmp_path / "trained", "--out", tmp_path / "cut", "--rank", 1)
    assert code == 0
    assert "relative error" in out
    code, out, err = run(
        capsys, "export", tmp_path / "trained", "--to", "merged", "--out", tmp_path / "merged", "--model", tiny
    )
    assert code == 0, err
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.allclose(logits(merged, batch), expected, atol=1e-5)


def test_init_with_data(tiny, sums, tmp_path, capsys):
    code, _, err = run(
        capsys, "init", tiny, "-m", "lora-one:samples=8", "--data", sums / "train.jsonl", "-o", tmp_path / "s", "-r", 2
    )
    assert code == 0, err
    tensors = load_file(tmp_path / "s" / "adapter_model.safetensors")
    assert all(tensor.norm() > 0 for name, tensor in tensors.items() if "lora_B" in name)


def test_init_with_data_for_some_kinds_of_layers_alone(tiny, sums, tmp_path, capsys):
    method = "lora-da:samples=4,layers=feed-forward"
    assert (
        run(capsys, "init", tiny, "-m", method, "--data", sums / "train.jsonl", "-o", tmp_path / "s", "-r", 2)[0] == 0
    )
    tensors = load_file(tmp_path / "s" / "adapter_model.safetensors")
    started = {name for name, tensor in tensors.items() if "lora_B" in name and tensor.norm() > 0}
    assert started and started == {name for name in tensors if "lora_B" in name and ".mlp." in name}
    code, _, err = run(capsys, "init", tiny, "-m", method, "--stream", "-o", tmp_path / "t", "-r", 2)
    assert code == 1 and "needs the whole model" in err


def test_data_that_no_one_reads_are_left_unread(tiny, sums, tmp_path, capsys):
    code, _, err = run(capsys, "init", tiny, "-m", "pissa", "--data", tmp_path / "none.jsonl", "-o", tmp_path / "s")
    assert code == 0 and "'pissa' reads no data" in err


def test_the_table_says_on_how_many_examples_was_measured(tiny, sums, tmp_path, capsys):
    """Of one file a fifth is held out, whatever was asked for."""
    arguments = small(tiny, sums / "train.jsonl", tmp_path / "c", "--methods", "lora")
    code, _, _ = run(capsys, *arguments, "--held-out-examples", 40)
    assert code == 0 and results(tmp_path / "c")["lora"]["metrics"]["loss/end"]["count"] == 4
    assert ", 4 held out" in (tmp_path / "c" / "report.md").read_text()


def test_compare_ends_in_a_table_and_a_page(tiny, sums, tmp_path, capsys):
    out = tmp_path / "c"
    code, printed, err = run(capsys, *small(tiny, sums, out, "--methods", "lora,pissa,lora-one:samples=4"))
    assert code == 0, err
    losses = {key: [loss for _, loss in result["series"]["loss"]] for key, result in results(out).items()}
    starts = {key: result["metrics"]["loss/start"]["value"] for key, result in results(out).items()}
    assert starts["lora"] == starts["pissa"]
    assert len(losses["lora"]) == 4
    # The first batch is the same and so is the model: only training tells the two apart.
    assert losses["lora"][0] == losses["pissa"][0]
    assert losses["lora"][1:] != losses["pissa"][1:]
    for method in ("lora", "pissa", "lora-one:samples=4"):
        assert re.search(rf"^\W*{re.escape(method)}\s", printed, re.M), printed
    page = (out / "report.html").read_text()
    assert "Plotly" in page
    assert not re.search(r"<(script|link)[^>]*\b(src|href)=(?!.data:)", page), "the page must need nothing beside it"
    assert hs.load_checkpoint(
        AutoModelForCausalLM.from_pretrained(tiny), cells(out)["pissa"] / "trained" / "checkpoint"
    )


def test_compare_takes_prose_and_report_takes_its_cells(tiny, tmp_path, capsys):
    prose = tmp_path / "prose.jsonl"
    prose.write_text("".join(json.dumps({"prompt": f"{i}", "completion": " words"}) + "\n" for i in range(40)))
    out = tmp_path / "study"
    settings = ["compare", str(tiny), "--data", str(prose), "--methods", "lora", "--steps", "1", "--out", str(out)]
    code, _, err = run(capsys, *settings)
    assert code == 0 and "no held-out example has an answer to grade by" in err
    (written,) = (out / "cells").glob("*/run.json")
    (out / "cells" / "begun").mkdir()
    shutil.copy(written, out / "cells" / "begun")
    code, _, err = run(capsys, "report", str(out), "--peft", str(tmp_path / "peft"))
    assert code == 0 and "1 of 2 cells" in err and len(list((tmp_path / "peft").iterdir())) == 1
    # What is asked for is done or refused.
    code, _, err = run(capsys, *settings, "--graded-examples", "4", "--force")
    assert code == 1 and "no held-out example has an answer to grade by" in err
    code, _, err = run(capsys, "compare", str(tiny), "--data", str(tmp_path / "none.jsonl"), "--dry-run")
    assert code and "none.jsonl" in err


def test_compare_goes_on_where_it_was_and_its_grid_may_grow(tiny, sums, tmp_path, capsys):
    out = tmp_path / "c"
    assert run(capsys, *small(tiny, sums, out, "--methods", "lora"))[0] == 0
    finished = (cells(out)["lora"] / "result.json").stat().st_mtime_ns
    assert run(capsys, *small(tiny, sums, out, "--methods", "lora,init-ab"))[0] == 0
    assert (cells(out)["lora"] / "result.json").stat().st_mtime_ns == finished
    # Other settings are other cells: what there is stays, and the page is of what was asked for last.
    code, printed, _ = run(capsys, *small(tiny, sums, out, "--methods", "lora", "--lr", "0.5"))
    assert code == 0 and len(list((out / "cells").glob("*/result.json"))) == 3 and "init-ab" not in printed
    code, _, _ = run(capsys, *small(tiny, sums, out, "--methods", "lora", "--lr", "0.5", "--force"))
    assert code == 0 and len(list((out / "cells").glob("*/result.json"))) == 1


def test_a_study_of_several_rates_chooses_by_validation_data(tiny, sums, tmp_path, capsys):
    out = tmp_path / "c"
    arguments = small(tiny, sums, out, "--methods", "lora,pissa", "--lr", "1e-3,1e-2", "--validation-examples", 4)
    code, printed, _ = run(capsys, *arguments, "--dry-run")
    assert code == 0 and "4 cells: 2 starts, 1 seeds" in printed and not out.exists()
    assert run(capsys, *arguments)[0] == 0
    noted = [json.loads(path.read_text()) for path in (out / "cells").glob("*/result.json")]
    assert sorted(result["settings"]["optimizer"]["lr"] for result in noted) == [1e-3, 1e-3, 1e-2, 1e-2]
    assert all("loss/validation" in result["metrics"] for result in noted)
    code, printed, _ = run(capsys, *arguments, "--dry-run")
    assert code == 0 and "4 are done, 0 are left" in printed


def test_a_studys_file_holds_its_settings_alone(tiny, sums, tmp_path, capsys):
    path = tmp_path / "study.yaml"
    path.write_text("base: {}\naxes: {start: [lora, pisa]}\n")
    code, _, err = run(capsys, "compare", path, "--dry-run")
    assert code == 1 and "Did you mean 'pissa'" in err
    path.write_text("base: {}\naxes: {start: [lora, pissa]}\n")
    code, _, err = run(capsys, "compare", path, "--lr", "1e-3")
    assert code == 2 and "--lr goes with no study's file: write it into" in " ".join(err.split())
    code, printed, _ = run(capsys, "compare", path, "--dry-run", "--max-time", "90m")
    assert code == 0 and "2 cells" in printed
    code, _, err = run(capsys, "compare", path, "--max-time", "soon")
    assert code == 2 and "no time" in err


def test_compare_goes_on_in_a_folder_that_a_kill_left_empty_and_names_a_damaged_run(tiny, sums, tmp_path, capsys):
    (tmp_path / "c" / "cells").mkdir(parents=True)
    arguments = small(tiny, sums, tmp_path / "c", "--methods", "lora")
    assert run(capsys, *arguments)[0] == 0
    place = cells(tmp_path / "c")["lora"]
    (place / "run.json").write_text("{")
    (place / "result.json").unlink()
    code, _, err = run(capsys, *arguments)
    assert code == 1 and "run.json is damaged" in " ".join(err.split())


def test_compare_never_takes_over_a_folder_with_something_else(tiny, sums, tmp_path, capsys):
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "precious").write_text("x")
    code, _, err = run(capsys, *small(tiny, sums, tmp_path / "c"))
    assert code == 2
    assert "holds something else" in err
    assert (tmp_path / "c" / "precious").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("methods", "pisa"), 1, "Did you mean 'pissa'?"),
        (("init", "MODEL", "-m", "init-ab:bta=2", "-o", "x"), 1, "Did you mean 'beta'?"),
        (("init", "MODEL", "-m", "lora-one", "-o", "x"), 1, "needs data"),
        (("init", "MODEL", "-m", "PISSA", "-o", "x"), 1, "Did you mean 'pissa'?"),
        (("init", "MODEL", "-m", "lora-sb:samples=2", "-o", "x", "--data", "BROKEN"), 1, "(--lr)"),
        (("init", "MODEL", "-m", "pissa", "-o", "EXISTING"), 1, "--force"),
        (("init", "MODEL", "-m", "pissa", "-o", "BROKEN"), 1, "is no folder, so it is not overwritten"),
        (("init", "MODEL", "-m", "pissa", "-o", "."), 1, "the folder that the command runs in"),
        (("init", "MODEL", "-m", "pissa", "-o", "x", "-r", "40"), 1, "smaller side"),
        (("init", "MODEL", "-m", "pissa", "-o", "x", "--targets", "nothing"), 1, "nothing"),
        (("init", "MODEL", "-m", "lora-one", "-o", "x", "--data", "BROKEN"), 1, "broken.jsonl, line 2"),
        (("init", "nowhere/to be found", "-m", "pissa", "-o", "x"), 1, "nowhere/to be found"),
        (("init", "MODEL", "-o", "x"), 2, "--method"),
        (("init", "MODEL", "-m", "pissa", "-o", "x", "--targets", "qproj,v_proj"), 1, "Did you mean 'q_proj'?"),
        (("compare", "MODEL", "--methods", ""), 1, "no method to compare"),
        (("compare", "MODEL", "--steps", "0"), 2, "--steps"),
        (("inspect", "MODEL"), 1, "holds no adapter_model.safetensors"),
        (("export", "nothing", "-o", "x"), 1, "is not a folder"),
        (("nonsense",), 2, "nonsense"),
    ],
)
def test_bad_input_is_one_clear_sentence(arguments, code, message, tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": \n{}\n')
    (tmp_path / "existing").mkdir()
    places = {"MODEL": str(tiny), "BROKEN": "broken.jsonl", "EXISTING": "existing"}
    found, _, err = run(capsys, *(places.get(argument, argument) for argument in arguments))
    assert found == code
    assert message in err
    assert "Traceback" not in err
    assert not (tmp_path / "x").exists()


def test_ctrl_c_keeps_what_is_finished(tiny, sums, tmp_path, capsys):
    out = tmp_path / "c"
    command = [sys.executable, "-c", "from headstart.cli import main; main()"]
    arguments = [str(a) for a in small(tiny, sums, out, "--methods", "lora,pissa")]
    arguments[arguments.index("--steps") + 1] = "12"
    # A shell's background jobs, and what they start, ignore the signal unless told otherwise.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = subprocess.Popen(
            command + arguments, stderr=subprocess.PIPE, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}
        )
    finally:
        signal.signal(signal.SIGINT, handler)
    deadline = time.monotonic() + 120
    while "pissa" not in cells(out) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert json.loads((cells(out)["lora"] / "result.json").read_text())["status"] == "done"
    assert "lora" in (out / "report.html").read_text()
    assert not (cells(out)["pissa"] / "result.json").exists()
    assert run(capsys, *arguments)[0] == 0
    # Cut in two or not, the run is the same.
    arguments[arguments.index(str(out))] = str(tmp_path / "uncut")
    arguments[arguments.index("lora,pissa")] = "pissa"
    assert run(capsys, *arguments)[0] == 0
    cut, uncut = (results(place)["pissa"] for place in (out, tmp_path / "uncut"))
    assert len(cut["series"]["loss"]) == 12
    for key in ("series", "metrics"):
        assert cut[key] == uncut[key], key


def test_a_start_that_can_not_be_made_keeps_no_other_from_being_compared(tiny, sums, tmp_path, capsys):
    """DoRA is not in it: rank 12 of the smaller side 16 is too much for the 2 r that LoRA-GA takes."""
    out = tmp_path / "c"
    arguments = small(tiny, sums, out, "--methods", "lora,lora-ga:samples=4,pissa", "--rank", 12)
    code, _, err = run(capsys, *arguments)
    assert code == 1
    assert re.search(r"lora-ga:samples=4 .*failed: ", err) and "Traceback" not in err
    assert [results(out)[name]["status"] for name in ("lora", "pissa", "lora-ga:samples=4")] == [
        "done",
        "done",
        "failed",
    ]
    # Where all fail, the first one's reason is the command's own.
    code, _, err = run(capsys, *small(tiny, sums, tmp_path / "d", "--methods", "lora-ga:samples=4", "--rank", 12))
    assert code == 1 and err.strip().count("\n") <= 3 and "Traceback" not in err


def test_answers_that_are_cut_off_are_reported(tiny, sums, tmp_path, capsys):
    code, _, err = run(capsys, *small(tiny, sums, tmp_path / "c", "--methods", "lora"))
    assert code == 0
    assert "2 of 2 answers were cut off after 3 tokens" in err


def test_force_deletes_nothing_but_comparisons(tiny, sums, tmp_path, capsys):
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "precious").write_text("x")
    code, _, err = run(capsys, *small(tiny, sums, tmp_path / "c", "--methods", "lora", "--force"))
    assert code == 2
    assert "nothing in it is touched" in err
    assert (tmp_path / "c" / "precious").exists()
    # A comparison is only deleted once the new one can be made.
    out = tmp_path / "d"
    assert run(capsys, *small(tiny, sums, out, "--methods", "lora"))[0] == 0
    arguments = list(small(tiny, sums, out, "--methods", "lora", "--force"))
    arguments[arguments.index(sums)] = tmp_path / "missing.jsonl"
    assert run(capsys, *arguments)[0] == 1
    assert (cells(out)["lora"] / "result.json").exists()


def test_the_page_of_methods_is_the_registrys(capsys):
    """`make docs` writes it anew."""
    page = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    assert run(capsys, "methods", "--markdown") == (0, page, "")
    assert all(f"| `{name}` |" in page for name in method_names())
    reading = {name for name in method_names() if describe(name)["data"] == "yes"}
    of_gradient = {"lora-ga", "lora-one", "lora-sb", "lora-da", "kfac-newton", "gora"} | {"keeplora", "keeplora-plus"}
    assert reading == {"eva", "corda", "astra", "sc-lora", "lora-null"} | of_gradient


def test_the_readmes_numbers_are_of_benchmarks_that_can_be_run_by_name():
    from bench.__main__ import ALL, MORE

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    pages = set(re.findall(r"\(docs/results/(\w+)\.md\)", text[text.index("## Numbers") :]))
    assert pages <= {*ALL, *MORE} and len(pages) >= 6
    for name in pages - set(ALL):
        assert f"python -m bench {name}" in text
    for name in (*ALL, *MORE):
        assert callable(importlib.import_module(f"bench.{name}").main)


def test_what_is_said_to_be_tested_is():
    page = (ROOT / "docs" / "supported.md").read_text(encoding="utf-8")
    named = re.findall(r"`(test_\w+\.py)(?:::(test_\w+))?`", page)
    assert len(named) > 40
    for file, test in named:
        assert f"def {test}(" in (ROOT / "tests" / file).read_text(encoding="utf-8") or not test, (file, test)


def test_the_readme_is_short_and_its_links_lead_somewhere():
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    assert len(pages[0].read_text(encoding="utf-8").splitlines()) < 150
    for page in pages:
        for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
            assert link.startswith("https://") or (page.parent / link).exists(), (page, link)


def test_splitting_lists_of_methods():
    assert split_methods("lora,init-ab:beta=2,scheme=sgd,pissa") == ("lora", "init-ab:beta=2,scheme=sgd", "pissa")
    assert split_methods("lora pissa") == ("lora", "pissa")


def test_reading_target_modules():
    assert target_modules("all-linear") == "all-linear"
    assert target_modules("q_proj, v_proj") == ("q_proj", "v_proj")
    assert target_modules("q_proj") == ("q_proj",)
    assert target_modules(r".*\.(q|v)_proj") == r".*\.(q|v)_proj"
