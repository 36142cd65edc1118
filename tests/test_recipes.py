"""The recipes of this package read, as does what their comments spell, and have the counts that the papers print."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from transformers import Gemma2Config, LlamaConfig, MistralConfig, RobertaConfig, T5Config

from headstart.methods import method_names, parse_method
from headstart.runs.read import read_run, recipes
from headstart.tasks import parse_task

RECIPES = dict(recipes())
PAPERS = {"inilora", "lora-da", "nonzero", "lora-sb", "peft"}
# What trains something in each paper; some figures share a table's runs.
SHOWN = {
    "inilora": {*(f"table{n}" for n in (1, 2, 3, 4, 6, 7)), *(f"figure{n}" for n in (2, 3, 4, 6))},
    "lora-da": {*(f"table{n}" for n in (1, 2, 3, 4, 7, 8, 9)), "figure4"},
    "nonzero": {f"figure{n}" for n in (4, 5, 6, 7, 10, 11)},
    "lora-sb": {*(f"table{n}" for n in (1, 2, 3, 4)), "figure3"},
    "peft": {"metamathqa"},
}
# "#   key=value key=value   (a remark)"
OVERRIDES = re.compile(r"#   (\S+=\S+(?: \S+=\S+)*)(?:   \(.*\))?")
EVALUATION = re.compile(r"#   headstart eval RUN --tasks (\S+)(?: --allow-code-execution)?")


def lines_of(name: str) -> list[str]:
    return RECIPES[name].read_text(encoding="utf-8").splitlines()


def spelled(name: str) -> list[list[str]]:
    """Return the overrides that a recipe's comment spells, a list for each line of them."""
    matches = [OVERRIDES.fullmatch(line) for line in lines_of(name)]
    return [match[1].split() for match in matches if match]


def graded_by(name: str) -> list[str]:
    """Return the tasks of the evaluation that a recipe's comment spells."""
    tasks: list[str] = []
    for match in map(EVALUATION.fullmatch, lines_of(name)):
        tasks += match[1].split(",") if match else []
    return tasks


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_reads_and_so_does_what_its_comment_spells(name: str) -> None:
    run, _ = read_run(name)
    parse_method(run.start.method)
    for overrides in spelled(name):
        changed, _ = read_run(name, overrides)
        parse_method(changed.start.method)
        assert changed != run, overrides


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_named_titled_and_laid_out(name: str) -> None:
    paper, _, rest = name.partition("/")
    assert paper in {*PAPERS, "small"}
    assert re.fullmatch(r"[a-z0-9]+(?:[-.][a-z0-9]+)*", rest)
    lines = lines_of(name)
    assert re.fullmatch(r"# [^:]+: .+ → .+", lines[0])
    for line in lines:
        # An indented comment is typed by somebody: nothing else may look like one.
        assert not line.startswith("#  ") or OVERRIDES.fullmatch(line) or EVALUATION.fullmatch(line), line


@pytest.mark.parametrize(
    "name", [name for name in RECIPES if name.partition("/")[0] in ("inilora", "lora-da", "lora-sb")]
)
def test_what_a_paper_grades_is_graded_by_its_recipe(name: str) -> None:
    run, _ = read_run(name)
    # Programs are run where somebody allows it by name alone.
    by_hand = "humaneval" in graded_by(name)
    assert bool(run.evaluation.tasks) != bool(run.data.held_out_examples or by_hand)


def test_no_recipe_differs_from_another_in_comments_alone() -> None:
    names_by_key: dict[str, list[str]] = {}
    for name in RECIPES:
        names_by_key.setdefault(read_run(name)[0].key, []).append(name)
    assert [names for names in names_by_key.values() if len(names) > 1] == []


@pytest.mark.parametrize("paper", SHOWN)
def test_whatever_trains_in_a_paper_has_a_recipe_and_a_small_one(paper: str) -> None:
    names = [name.partition("/")[2] for name in RECIPES if name.startswith(f"{paper}/")]
    assert {name.partition("-")[0] for name in names} == SHOWN[paper]
    small = {name.removeprefix(f"small/{paper}-") for name in RECIPES if name.startswith(f"small/{paper}-")}
    assert small == SHOWN[paper]


def test_every_start_can_be_compared_in_pefts_setting() -> None:
    name = "peft/metamathqa-llama3.2-3b"
    runs = [read_run(name)[0], *(read_run(name, overrides)[0] for overrides in spelled(name))]
    assert {parse_method(run.start.method).name for run in runs} == {
        method for method in method_names() if parse_method(method).__class__.__module__.startswith("headstart.")
    }


def test_small_recipes_are_small_and_need_no_hub() -> None:
    for name in RECIPES:
        if name.startswith("small/"):
            run, _ = read_run(name)
            assert run.model.name in ("smollm2", "minilm"), name
            assert run.schedule.steps is not None and 20 <= run.schedule.steps <= 60, name
            assert run.batch.size * run.batch.max_length <= 2048, name
            local = any(override.startswith("data.train=") for line in spelled(name) for override in line)
            assert run.data.task == "problems" or local, name


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_s_tasks_are_known(name: str) -> None:
    runs = [read_run(name)[0], *(read_run(name, overrides)[0] for overrides in spelled(name))]
    for run in runs:
        # What is held out of the task's own data must be a split that it has.
        task = parse_task(run.data.held_out_task or run.data.task)
        wants = run.data.held_out_examples or run.evaluation.graded_examples
        assert not wants or run.data.train or not task.splits or "test" in task.splits or name.startswith("small/")
    for text in [*graded_by(name), *(text for run in runs for text in run.evaluation.tasks)]:
        assert parse_task(text).metrics, text


LLAMA_3_2_3B = LlamaConfig(
    hidden_size=3072,
    num_hidden_layers=28,
    num_attention_heads=24,
    num_key_value_heads=8,
    head_dim=128,
    intermediate_size=8192,
    vocab_size=128256,
    tie_word_embeddings=True,
)
MISTRAL_7B = MistralConfig()  # its defaults are the 7B's sizes
GEMMA_2_9B = Gemma2Config(
    hidden_size=3584,
    num_hidden_layers=42,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=256,
    intermediate_size=14336,
)
ROBERTA_BASE = RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1)
ROBERTA_LARGE = RobertaConfig(
    vocab_size=50265,
    max_position_embeddings=514,
    type_vocab_size=1,
    hidden_size=1024,
    num_hidden_layers=24,
    num_attention_heads=16,
    intermediate_size=4096,
)
T5_BASE = T5Config(
    vocab_size=32128,
    d_model=768,
    d_ff=3072,
    num_layers=12,
    num_decoder_layers=12,
    num_heads=12,
    decoder_start_token_id=0,
)


def counted(folder: Path, config: object, name: str, *overrides: str) -> tuple[int, int, int]:
    """Return how many numbers of a recipe's adapter train, of its head, and there are in the model."""
    from headstart.runs.plan import planned

    config.save_pretrained(folder)  # type: ignore[attr-defined]
    plan = planned(read_run(name, [f"model.name={folder}", *overrides])[0])
    return plan.trainable - plan.head, plan.head, plan.parameters


@pytest.mark.parametrize(
    ("config", "name", "adapter", "printed", "model"),
    [
        (ROBERTA_BASE, "inilora/table1-roberta-base-cola", 12 * 2 * 8 * 2 * 768, "0.3M", "125M"),
        # The table quotes 356M for the whole of the large one; there are 355.4 million, its head included.
        (ROBERTA_LARGE, "inilora/table1-roberta-large-sts-b", 24 * 2 * 8 * 2 * 1024, "0.8M", "355M"),
    ],
)
def test_inilora_prints_these_counts(
    tmp_path: Path, config: RobertaConfig, name: str, adapter: int, printed: str, model: str
) -> None:
    trains, head, total = counted(tmp_path, config, name)
    assert trains == adapter
    assert f"{trains / 1e6:.1f}M" == printed
    # Of the head, which trains whole, the printed counts say nothing.
    outputs = 1 if name.endswith("sts-b") else 2
    assert head == (config.hidden_size + 1) * (config.hidden_size + outputs)
    assert f"{total / 1e6:.0f}M" == model


def test_bitfit_prints_these_counts(tmp_path: Path) -> None:
    from headstart.runs.plan import planned

    ROBERTA_BASE.save_pretrained(tmp_path)
    overrides = [f"model.name={tmp_path}", "trains=bitfit", "adapter={}", "start=lora"]
    plan = planned(read_run("inilora/table1-roberta-base-cola", overrides)[0])
    body = plan.trainable - (768 * 768 + 768 + 768 * 2 + 2)
    assert f"{body / 1e6:.1f}M" == "0.1M"


@pytest.mark.parametrize(
    ("config", "name", "low", "high", "fewer", "printed"),
    [
        # The ranks of LoRA and LoRA-SB that the paper compares, how many times fewer numbers train, what it prints.
        (MISTRAL_7B, "lora-sb/table1-mistral-7b", 32, 96, 40.6, 40),
        (GEMMA_2_9B, "lora-sb/table1-gemma-2-9b", 32, 64, 89.7, 90),
        (LLAMA_3_2_3B, "lora-sb/table2-llama3.2-3b", 32, 96, 26.9, 27),
        (ROBERTA_LARGE, "lora-sb/table3-roberta-large-rte", 8, 24, 39.1, 39),
    ],
)
def test_lora_sb_trains_as_many_times_fewer_as_printed(
    tmp_path: Path, config: object, name: str, low: int, high: int, fewer: float, printed: int
) -> None:
    many, _, _ = counted(tmp_path, config, name, "start=lora", f"adapter.r={low}")
    few, _, _ = counted(tmp_path, config, name, f"adapter.r={high}")
    assert round(many / few, 1) == fewer
    assert abs(many / few - printed) < 1


def test_without_the_last_map_of_a_layer_roberta_would_have_another_count(tmp_path: Path) -> None:
    name, attention = "lora-sb/table3-roberta-large-rte", "adapter.targets=[query,key,value,attention.output.dense]"
    many, _, _ = counted(tmp_path, ROBERTA_LARGE, name, "start=lora", "adapter.r=8", attention)
    few, _, _ = counted(tmp_path, ROBERTA_LARGE, name, attention)
    assert round(many / few) == 28


@pytest.mark.parametrize(
    ("name", "config", "adapter"),
    [
        # q and v of 12 encoder layers, and of 12 decoder layers' two attentions.
        ("nonzero/figure4-t5-base-cola", T5_BASE, (12 + 2 * 12) * 2 * 16 * 2 * 768),
        ("nonzero/figure11-t5-base-mrpc", T5_BASE, (12 + 2 * 12) * 2 * 16 * 2 * 768),
        ("peft/metamathqa-llama3.2-3b", LLAMA_3_2_3B, 28 * 32 * ((3072 + 3072) + (3072 + 1024))),
    ],
)
def test_other_recipes_find_their_layers(tmp_path: Path, name: str, config: object, adapter: int) -> None:
    assert counted(tmp_path, config, name)[0] == adapter


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("lora-da/table2-llama2-7b", 3125),
        ("lora-sb/table1-mistral-7b", 1563),
        ("inilora/table4-llama2-7b-100k", 1563),
        ("peft/metamathqa-llama3.2-3b", 5000),
    ],
)
def test_recipes_take_as_many_steps_as_the_papers(name: str, steps: int, tmp_path: Path) -> None:
    from headstart.runs.plan import planned

    config = LlamaConfig(
        hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64, vocab_size=64
    )
    config.save_pretrained(tmp_path)
    overrides = [f"model.name={tmp_path}", "adapter.r=2", "start=lora"]
    assert planned(read_run(name, overrides)[0]).steps == steps


@pytest.mark.parametrize("name", [name for name in RECIPES if "t5-base" in name])
def test_t5_is_trained_text_to_text_and_all_that_is_held_out_graded(name: str, tmp_path: Path) -> None:
    for overrides in ([], *spelled(name)):
        run, _ = read_run(name, overrides)
        assert parse_task(run.data.task).kind == "text"
        assert run.evaluation.graded_examples == run.data.held_out_examples > 400
    _, head, parameters = counted(tmp_path, T5_BASE, name)
    assert head == 0 and f"{parameters / 1e6:.0f}M" == "223M"
