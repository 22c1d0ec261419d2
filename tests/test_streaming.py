"""Text is written as it comes, row by row, and each step has its time."""

import torch
from packed_models import pack_randomly
from tiny_models import tiny_llama, tiny_tokenizer

from nanoquant.generate import generate
from nanoquant.generation_settings import GenerationSettings
from nanoquant.streaming import BatchStreamer


def ids(tokenizer, text):
    return torch.tensor(tokenizer(text)["input_ids"])


def test_whole_words_are_written_at_once_and_a_row_ends_at_its_end_token():
    tokenizer, seen = tiny_tokenizer(), []
    streamer = BatchStreamer(tokenizer, 2, {2}, lambda *new: seen.append(new), first=5)
    streamer.put(torch.ones(2, 3, dtype=torch.long))
    for one, other in zip(ids(tokenizer, "ab c"), [*ids(tokenizer, "x"), 2, 0, 0], strict=True):
        streamer.put(torch.stack([one, torch.as_tensor(other)]))
    assert seen == [(6, "x", True), (5, "ab ", False)]
    streamer.end()
    assert seen[2:] == [(5, "c", True)]
    assert len(streamer.step_seconds) == 3 and streamer.prefill_seconds >= 0


def test_without_a_writer_only_the_times_are_taken():
    streamer = BatchStreamer(tiny_tokenizer(), 1, set())
    for _ in range(3):
        streamer.put(torch.ones(1, 1, dtype=torch.long))
    streamer.end()
    assert len(streamer.step_seconds) == 1


def test_pieces_make_up_the_texts_of_all_batches():
    model, tokenizer = pack_randomly(tiny_llama(tie=False)), tiny_tokenizer()
    prompts = ["Hello there", "a", "the river runs over stone"]
    pieces, ended = {0: [], 1: [], 2: []}, []

    def write(number, text, last):
        pieces[number].append(text)
        ended.extend([number] * last)

    options = {"suppress_tokens": [0, 2], "sequence_bias": [[[5], 4.0]]}  # spaces, to make words
    settings = GenerationSettings(max_new_tokens=40, temperature=0, options=options, batch=2)
    done = generate(model, tokenizer, prompts, settings, write)
    assert ["".join(pieces[number]) for number in range(3)] == done.texts
    assert sorted(ended) == [0, 1, 2]
    assert max(len([text for text in found if text]) for found in pieces.values()) > 2
