"""How a model is asked: its answers are the likeliest whatever it ships, and what is scored is what was trained."""

from __future__ import annotations

import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, GenerationConfig

from headstart.errors import HeadstartWarning
from headstart.evaluation.answers import answered
from headstart.tasks.base import Example
from running import llama_folder, tokenizer


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
