"""A small language model that the tutorials train for a few seconds, because random weights show nothing.

It reads characters: two decoder blocks, a vocabulary of 100, on the text in `recipes/data/`. Nothing is downloaded.
"""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from nanoquant.console import quiet

quiet()  # before the import that brings torchao along, which tells of libraries for other machines
import transformers  # noqa: E402

DATA = Path(__file__).resolve().parents[1] / "recipes" / "data"
TRAIN, TEST = DATA / "wiki_train.txt", DATA / "wiki_test.txt"
HIDDEN, LENGTH = 64, 64
BATCH, RATE = 8, 6e-3
SPECIALS = ["<pad>", "<bos>", "<eos>", "<unk>"]


def character_tokenizer():
    """One token for each printable ASCII character, and one for all others."""
    characters = [*SPECIALS, "\n", *map(chr, range(32, 127))]
    vocabulary = {character: number for number, character in enumerate(characters)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    names = ("pad_token", "bos_token", "eos_token", "unk_token")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **dict(zip(names, SPECIALS, strict=True))
    )


def windows(tokenizer, file, count, skip=0):
    """Token ids (count, LENGTH) from a text, `skip` windows after its beginning."""
    text = file.read_text(encoding="utf-8")[: (skip + count) * LENGTH + 1000]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return torch.tensor(ids[skip * LENGTH : (skip + count) * LENGTH]).view(count, LENGTH)


def small_model(steps=300, blocks=2):
    """The trained model in evaluation mode, and its tokenizer; the same every time on one machine."""
    torch.manual_seed(0)
    tokenizer = character_tokenizer()
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        max_position_embeddings=2 * LENGTH,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = transformers.LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    for batch in windows(tokenizer, TRAIN, BATCH * steps).split(BATCH):
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval(), tokenizer
