"""Tiny random models of several families: 2 or 3 blocks, hidden 64, vocabulary 128."""

import tokenizers
import tokenizers.decoders
import torch
import transformers as tf

VOCAB = 128
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GATED = SIZES | {"intermediate_size": 96, "num_key_value_heads": 2}


def build(config, dtype=torch.float32, seed=0):
    """Random model of a config, in evaluation mode; weights large enough to matter."""
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    config.initializer_range = 0.1
    model = tf.AutoModelForCausalLM.from_config(config, dtype=dtype)
    torch.random.set_rng_state(state)
    return model.eval()


def tiny_llama(tie=True, layers=2, dtype=torch.float32, **changes):
    sizes = GATED | {"num_hidden_layers": layers, "tie_word_embeddings": tie} | changes
    return build(tf.LlamaConfig(**sizes), dtype)


def tiny_qwen2(layers=2, dtype=torch.float32):
    return build(tf.Qwen2Config(**GATED, num_hidden_layers=layers), dtype)


def tiny_qwen3(layers=2, dtype=torch.float32):
    return build(tf.Qwen3Config(**GATED, num_hidden_layers=layers, head_dim=16), dtype)


def tiny_gemma2(layers=2, dtype=torch.float32):
    sizes = GATED | {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16}
    return build(tf.Gemma2Config(**sizes, num_hidden_layers=layers), dtype)


def tiny_gemma3(layers=3, dtype=torch.float32):
    kinds = ["sliding_attention"] * (layers - 1) + ["full_attention"]
    sizes = GATED | {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16}
    config = tf.Gemma3TextConfig(**sizes, num_hidden_layers=layers, layer_types=kinds)
    return build(config, dtype)


def tiny_mistral(layers=2, dtype=torch.float32):
    return build(tf.MistralConfig(**GATED, num_hidden_layers=layers, sliding_window=8), dtype)


def tiny_phi(layers=2, dtype=torch.float32):
    return build(tf.PhiConfig(**SIZES, intermediate_size=96, num_hidden_layers=layers), dtype)


def tiny_phi3(layers=2, dtype=torch.float32):
    return build(tf.Phi3Config(**GATED, num_hidden_layers=layers), dtype)


def tiny_opt(layers=2, dtype=torch.float32):
    sizes = SIZES | {"ffn_dim": 96, "word_embed_proj_dim": 64, "dropout": 0.1}
    return build(tf.OPTConfig(**sizes, num_hidden_layers=layers), dtype)


def tiny_gpt2(layers=2, dtype=torch.float32):
    config = tf.GPT2Config(
        vocab_size=VOCAB,
        n_embd=64,
        n_head=4,
        n_inner=96,
        n_layer=layers,
        n_positions=128,
        bos_token_id=1,
        eos_token_id=2,
    )
    return build(config, dtype)


def tiny_mixtral(layers=2, dtype=torch.float32):
    """A mixture of experts: its fused expert tensors are not linears, so it must be refused."""
    sizes = GATED | {"num_local_experts": 4, "num_experts_per_tok": 2}
    return build(tf.MixtralConfig(**sizes, num_hidden_layers=layers), dtype)


FAMILIES = {
    "llama": tiny_llama,
    "qwen2": tiny_qwen2,
    "qwen3": tiny_qwen3,
    "gemma2": tiny_gemma2,
    "gemma3": tiny_gemma3,
    "mistral": tiny_mistral,
    "phi": tiny_phi,
    "phi3": tiny_phi3,
    "opt": tiny_opt,
    "gpt2": tiny_gpt2,
}


def random_windows(count, length, seed=0, vocab=VOCAB):
    """Random token ids (count, length)."""
    return torch.randint(3, vocab, (count, length), generator=torch.manual_seed(seed))


def tiny_tokenizer(add_bos=False):
    """Tokenizer with one token per printable ASCII character; adds BOS in front if asked."""
    specials = ["<pad>", "<bos>", "<eos>", "<unk>"]
    vocab = {token: i for i, token in enumerate([*specials, "\n", *map(chr, range(32, 127))])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = tokenizers.decoders.Fuse()
    if add_bos:
        template = tokenizers.processors.TemplateProcessing("<bos> $0", None, [("<bos>", 1)])
        tokenizer.post_processor = template
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        model_max_length=64,
    )
