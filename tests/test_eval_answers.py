"""How a model is asked: likeliest answers whatever it ships, choices in the tokens trained, packed held-out data."""

from __future__ import annotations

import warnings

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

from conftest import tiny_llama
from headstart.errors import HeadstartWarning
from headstart.evaluation import own
from headstart.evaluation.answers import answered, prompt_ids
from headstart.evaluation.held_out import held_out
from headstart.evaluation.own import Asker, Asking, compared
from headstart.progress import silent
from headstart.runs.stages import execute
from headstart.tasks import parse_task
from headstart.tasks.base import Example
from headstart.training.data import following_ids, token_ids
from running import llama_folder, small_run, sums, tokenizer

trl = pytest.importorskip("trl")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return llama_folder(tmp_path_factory.mktemp("model") / "llama")


def greedy(model, ids, steps, ends):
    """The likeliest tokens after others, one dense float64 pass for each."""
    written = []
    while len(written) < steps and written[-1:] not in [[end] for end in ends]:
        with torch.no_grad():
            written.append(int(model(torch.tensor([ids + written])).logits[0, -1].argmax()))
    return written


# What a model's folder says of how it is to be generated from, and none of which is greedy.
GENERATION = {
    "penalty": {"repetition_penalty": 1.5},
    "beams": {"num_beams": 4},
    "no repeats": {"no_repeat_ngram_size": 1},
    "suppressed": {"suppress_tokens": list(range(3, 60))},
    "forced": {"forced_bos_token_id": 7, "forced_eos_token_id": 5, "min_new_tokens": 9},
    "drawn": {"do_sample": True, "temperature": 3.0, "top_k": 5, "min_p": 0.5},
    "biased": {"sequence_bias": [[[9], 10.0]], "guidance_scale": 3.0},
    "short": {"max_length": 3},
}


@pytest.mark.parametrize("wrapped", [False, True], ids=["model", "peft"])
@pytest.mark.parametrize("case", GENERATION)
def test_the_likeliest_answer_is_the_argmax_of_a_dense_pass_whatever_the_model_ships(case, wrapped, model):
    loaded, exact = (AutoModelForCausalLM.from_pretrained(model).to(dtype).eval() for dtype in (None, torch.float64))
    words, shipped = tokenizer(), GenerationConfig(eos_token_id=[1, 63], **GENERATION[case])
    loaded.generation_config = shipped
    asker = get_peft_model(loaded, LoraConfig(target_modules=["q_proj"])) if wrapped else loaded
    prompts = ["3 + 4?", "A: ", "one, two and"]
    given = answered(asker, words, [Example(prompt) for prompt in prompts], max_new_tokens=12)
    for prompt, answer in zip(prompts, given, strict=True):
        by_hand = greedy(exact, list(words(prompt)["input_ids"]), 12, ends=(1, 63))
        assert answer == words.decode(by_hand, skip_special_tokens=True)
    assert loaded.generation_config is shipped


def test_an_answer_ends_at_each_of_the_models_ends(model):
    loaded, words = AutoModelForCausalLM.from_pretrained(model).eval(), tokenizer()
    prompt = [Example("3 + 4?")]
    with pytest.warns(HeadstartWarning, match="1 of 1 answers were cut off after 6"):
        whole = answered(loaded, words, prompt, max_new_tokens=6)[0]
    end = words(whole)["input_ids"][2]
    loaded.generation_config = GenerationConfig(eos_token_id=[62, end])
    with warnings.catch_warnings():
        warnings.simplefilter("error", HeadstartWarning)
        ended = answered(loaded, words, prompt, max_new_tokens=6)[0]
    assert ended == whole[: whole.index(words.decode([end])) + 1]


def spaced_tokenizer(scheme):
    """Blanks as signs, one of which begins a text, as SentencePiece has it."""
    letters = ["<pad>", "<eos>", "<unk>", "\u2581", "\n", *map(chr, range(33, 127))]
    words = [
        "\u2581the",
        "the",
        "\u2581correct",
        "\u2581answer",
        "answer",
        "\u2581is",
        "\u2581A",
        "true",
        "\u2581true",
        ":t",
        "e:",
    ]
    scores = [(word, -10.0 if len(word) == 1 else -5.0) for word in letters + words]
    raw = Tokenizer(models.Unigram(scores, unk_id=2))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    raw.decoder = decoders.Metaspace(prepend_scheme=scheme)
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


@pytest.mark.parametrize("scheme", ["first", "always"])
def test_choices_are_scored_in_the_tokens_that_follow_the_prompt(scheme, tmp_path, monkeypatch):
    words, scored = spaced_tokenizer(scheme), []

    def scores(_, rows):
        scored.extend(rows)
        return [1.0] * len(rows)

    monkeypatch.setattr(own, "nats_of", scores)
    example = Example("### Response:", "the correct answer is true", choices=("the correct answer is true", " A"))
    compared(Asker(tiny_llama(), words, tmp_path, Asking(), None, silent), parse_task("boolq"), [example])
    begin = words(example.prompt)["input_ids"]
    for (ids, start), choice in zip(scored, example.choices, strict=True):
        assert ids == words(example.prompt + choice)["input_ids"] and ids[:start] == begin
    first, second = (words.convert_ids_to_tokens(ids[start:]) for ids, start in scored)
    assert first == ["the", "\u2581correct", "\u2581answer", "\u2581is", "\u2581true"] and second == ["\u2581A"]
    assert token_ids(example, words) == (begin, [*scored[0][0][len(begin) :], words.eos_token_id])


@pytest.mark.parametrize("scheme", ["first", "always"])
@pytest.mark.parametrize(
    ("prompt", "text", "tokens"),
    [
        ("", "the", ["\u2581the"]),  # nothing precedes it
        ("Is it ", "the", ["the"]),  # whose blank would be the word's
        ("Is it:", "true", ["true"]),  # whose colon would be
        ("Is it", "\nthe", ["\n", "the"]),
        ("Is it\n", "\n\nthe", ["\n", "\n", "the"]),
    ],
)
def test_tokens_of_a_text_after_a_prompt_begin_at_the_border(scheme, prompt, text, tokens):
    words = spaced_tokenizer(scheme)
    assert words.convert_ids_to_tokens(following_ids(text, prompt, words)) == tokens


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_held_out_samples_are_the_same_where_training_is_packed(size, model, tmp_path):
    words = tokenizer()
    rows = [{"prompt": "3 + 4?" + "a" * (row % 3), "completion": "It is" + "." * row} for row in range(6)]
    common = dict(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[], max_length=64, eos_token="<eos>")
    found = {}
    for name, settings in (("apart", {}), ("flat", {"packing": True, "eval_packing": False})):
        loaded, data = AutoModelForCausalLM.from_pretrained(model), Dataset.from_list(rows)
        config = trl.SFTConfig(**common, per_device_eval_batch_size=size, **settings)
        trainer = trl.SFTTrainer(loaded, config, train_dataset=data, eval_dataset=data, processing_class=words)
        found[name] = held_out(trainer)
        kept = trainer.eval_dataset
    assert found["flat"].weights.tolist() == found["apart"].weights.tolist() == [row + 6 for row in range(6)]
    exact = AutoModelForCausalLM.from_pretrained(model).double().eval()
    by_hand = []
    for row, wanted in zip(rows, kept, strict=True):
        ids, start = wanted["input_ids"], len(words(row["prompt"])["input_ids"])
        with torch.no_grad():
            steps = exact(torch.tensor([ids])).logits[0].log_softmax(-1)
        by_hand.append(-sum(float(steps[place - 1, ids[place]]) for place in range(start, len(ids))))
    for measured in found.values():
        assert measured.losses.tolist() == pytest.approx(by_hand, rel=1e-5)


def test_a_run_that_packs_measures_each_held_out_example(model, tmp_path):
    data, batch = sums(tmp_path / "sums.jsonl", 40), {"size": 2, "max_length": 64}
    results = [
        execute(
            small_run(model, data, schedule={"steps": 1}, batch=batch | {"packing": packing}), tmp_path / f"{packing}"
        )
        for packing in (False, True)
    ]
    apart, packed = (result.metrics["loss/start"] for result in results)
    assert packed.count == apart.count == 6
    bounds = ((figure.value, figure.low, figure.high) for figure in (packed, apart))
    assert next(bounds) == pytest.approx(next(bounds), rel=1e-5)


@pytest.mark.parametrize("template", ["$A", "<s> $A", "<s> $A <eos>", "$A <eos>"])
def test_a_model_is_asked_the_tokens_that_training_has_before_the_completion(template):
    words = tokenizer()
    words.add_tokens(["<s>"], special_tokens=True)
    special = [(name, words.convert_tokens_to_ids(name)) for name in ("<s>", "<eos>")]
    words.backend_tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    example = Example("3 + 4?", " 7")
    plain = words(example.prompt, add_special_tokens=False)["input_ids"]
    begin = [special[0][1]] if template.startswith("<s>") else []
    assert prompt_ids(example, words) == begin + plain == token_ids(example, words)[0]
