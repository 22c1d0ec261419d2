"""Rules that a careful practitioner applies, each a small function with its source: what applies to a case, or None."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from nanoquant.advice.catalogue import Named
from nanoquant.advice.config import Use
from nanoquant.advice.options import OTHERS, dense_linears, weight_bytes
from nanoquant.advice.published import PAPER
from nanoquant.advice.rows import Row, Table
from nanoquant.units import amount

WORTH_SAYING = 0.05
"""Share of padding from which it is named."""
LARGE_SHARE = 0.25
"""Share of the bytes from which embedding and head are worth quantizing too."""


@dataclass(frozen=True)
class Applied:
    """A rule that applies."""

    name: str
    text: str
    source: str


@dataclass(frozen=True)
class Case:
    """What rules look at."""

    named: Named
    task: str
    use: Use
    table: Table
    best: Row | None
    """The best option of the model itself that fits."""

    @property
    def low(self) -> bool:
        """Whether the model itself fits below 4 bits only, or not at all."""
        return self.best is None or not self.best.careful

    @property
    def ours(self) -> bool:
        """Whether the best option of the model is one of this library."""
        return self.best is not None and self.best.option.tool == "nanoquant"


def mathematics(case: Case) -> Applied | None:
    """Below 4 bits mathematics goes first."""
    if case.task != "math":
        return None
    return Applied(
        "math needs 4 bits",
        "8 bits, and 4 bits of weights alone, are called lossless for reasoning, fewer bits a "
        "significant risk; small models lose at 4 bits too, so check answers of your own",
        "arXiv 2504.04823, abstract; losses at 4 bits: arXiv 2505.11574, abstract",
    )


def code(case: Case) -> Applied | None:
    """Below 4 bits code goes first."""
    if case.task != "code":
        return None
    return Applied(
        "code needs 4 bits",
        "4 bits cost no significant share of passed tests; at 3 and 2 bits it takes calibration "
        "on code to limit the loss",
        "arXiv 2503.07103, abstract",
    )


def long_context(case: Case) -> Applied | None:
    """Long context suffers at 4 bits already."""
    if case.task != "long-context":
        return None
    return Applied(
        "long context needs 8 bits",
        "over inputs above 64k tokens 8 bits lose about 0.8 % on average, methods of 4 bits up to "
        "59 % on some tasks",
        "arXiv 2505.20276, abstract",
    )


def smaller_at_more_bits(case: Case) -> Applied | None:
    """A smaller model at more bits often beats a larger one at one bit."""
    if not case.low:
        return None
    return Applied(
        "a smaller model at more bits often wins",
        "Qwen3-1.7B in bf16 takes 3.4 GB and has perplexity 9.4, Qwen3-8B at 1 bit takes 3.4 GB "
        "and has 12.5; for a given number of bits in all, 4 bits a weight are almost always best "
        "for zero-shot accuracy",
        f"{PAPER}, Tables 2 and 13; arXiv 2212.09720, abstract",
    )


def one_bit(case: Case) -> Applied | None:
    """At one bit and below, zero-shot accuracy falls far."""
    if not (case.ours and case.best.option.bits <= 1):
        return None
    return Applied(
        "one bit costs much accuracy",
        "the mean of six zero-shot tasks of Llama-3-8B falls from 71.44 to 45.95 at 1 bit, chance "
        "is 37.5; mathematics, code, long context and following instructions were not evaluated",
        f"{PAPER}, Table 3",
    )


def below_one_bit(case: Case) -> Applied | None:
    """Below one bit the next smaller model is better."""
    if not (case.ours and case.best.option.bits < 1):
        return None
    return Applied(
        "below 1 bit, take the next smaller model",
        "in all 12 published cases with a smaller sibling, the sibling at 1 bit is smaller and "
        "has a lower perplexity than the larger model at 0.55 bit (Llama-2-13B: 8.71, 2.2 GB; "
        "Llama-2-70B: 9.82, 5.75 GB)",
        f"{PAPER}, Tables 2 and 13",
    )


def two_bits(case: Case) -> Applied | None:
    """Two bits need codebooks."""
    row = case.table.row("2-bit")
    if not case.low or row is None or row.fits == "no":
        return None
    return Applied(
        "2 bits in plain groups collapse",
        "Llama-2-7B at 2.28 bits by GPTQ has perplexity 21.0, at 1 bit by factors 10.3, at 2.02 "
        "bits by trained codebooks (AQLM+PV) 5.84; Qwen3-8B by GPTQ 113, by factors at 2.0 bits "
        "8.5: at 2 bits only ready-made codebooks, or factors, are worth a look",
        f"{PAPER}, Tables 4 and 8, Fig. 6",
    )


def two_methods(case: Case) -> Applied | None:
    """At equal bytes signs win at 1 bit and below, codebooks from 2 bits on."""
    if not case.ours:
        return None
    return Applied(
        "signs at 1 bit and below, codebooks at 2",
        "SmolLM2-135M after the same short training, perplexity with signs and with two codebooks a "
        "linear, mean of two seeds: at 2 bits 63 and 58, at 1 bit 403 and 786, at 0.55 bit 1,936 and 2,667; "
        "at 0.8 the seeds disagree. Gemma 3 270M, one seed: at 2, 1, 0.8 and 0.55 bits "
        "60 and 62, 228 and 359, 455 and 811, 733 and 1,203. "
        "On a CPU codebooks decode 2.2 to 2.7 times slower; no larger model was compared",
        "recipes/methods.md of this project",
    )


def embedding_share(case: Case) -> Applied | None:
    """Tiny models have their bytes in the embedding."""
    share = case.table.embedding_share
    row, smaller, lower = (case.table.row(*key) for key in (("1.0",), ("1.0", 8), ("0.55",)))
    if share < LARGE_SHARE or smaller is None or lower is None:
        return None
    saved = [amount(row.cost.weights - other.cost.weights) for other in (smaller, lower)]
    return Applied(
        "the bytes are in the embedding",
        f"with linears at 1 bit, embedding and head in bf16 are {share:.0%} of the weights: "
        f"--embedding.bits 8 saves {saved[0]}, linears at 0.55 bit save {saved[1]} (8 bits cost the "
        "demo model a KL of 0.003 nats a token)",
        "arithmetic above",
    )


def groups_left_dense(case: Case) -> Applied | None:
    """Groups that don't divide rows leave linears in bf16."""
    left = {
        row.option.name: count
        for row in case.table.rows
        if row.option.tool == "torchao" and (count := dense_linears(case.table.model, row.option))
    }
    if not left:
        return None
    listed = ", ".join(f"{count} with {name}" for name, count in left.items())
    return Applied(
        "groups must divide rows",
        f"torchao leaves linears in bf16 whose rows the group does not divide: {listed} of "
        f"{len(case.table.model.linears)}; the table counts them so",
        "torchao 0.18, Int4WeightOnlyConfig",
    )


def padded_rows(case: Case) -> Applied | None:
    """Torchao's int4 layout for GPUs fills rows up."""
    option = next(option for option in OTHERS if option.key == "int4-g128")
    plain, padded = (weight_bytes(case.table.model, option, kind) for kind in ("cpu", "cuda"))
    if case.use.device != "cuda" or padded < (1 + WORTH_SAYING) * plain:
        return None
    return Applied(
        "int4 for GPUs fills rows up",
        f"torchao's layout tile_packed_to_4d fills rows up to multiples of 1024 weights, which makes "
        f"{option.name} {padded / plain - 1:.0%} larger here; the table counts it so",
        "torchao 0.18, Int4TilePackedTo4dTensor",
    )


def cache_dominates(case: Case) -> Applied | None:
    """With long context the cache is what takes memory."""
    row = case.best or min(case.table.rows, key=lambda row: row.cost.total)
    if row.cost.cache <= row.cost.weights:
        return None
    cache, weights = amount(row.cost.cache), amount(row.cost.weights)
    return Applied(
        "the cache takes more than the weights",
        f"{row.option.name}: cache {cache}, weights {weights}; fewer bits of weights hardly help, a "
        "shorter context, a smaller batch or a cache of 8 bits (--cache-bits 8) does",
        "arithmetic above",
    )


def prompt_in_pieces(case: Case) -> Applied | None:
    """A long prompt read at once takes much for a moment."""
    row = case.best or min(case.table.rows, key=lambda row: row.cost.total)
    if row.cost.activations < LARGE_SHARE * row.cost.total:
        return None
    return Applied(
        "read long prompts in pieces",
        f"{amount(row.cost.activations)} of {amount(row.cost.total)} are activations while the whole "
        "context is read at once; generate(prefill_chunk_size=1024) of transformers divides that",
        "arithmetic above",
    )


def post_trained(case: Case) -> Applied | None:
    """Published figures are of base models."""
    if not (case.named.post_trained or case.named.thinks):
        return None
    text = (
        "most published figures are of base models; calibrate with text in the model's chat "
        "template and judge its answers, not perplexity alone"
    )
    if case.named.thinks:
        text += ". It reasons at length, where errors add up: test it thinking and not thinking"
    return Applied("this model is post-trained", text, "sources above; arXiv 2504.04823")


def calibration_mix(case: Case) -> Applied | None:
    """Calibrate on a mix."""
    if not case.ours:
        return None
    return Applied(
        "calibrate on a mix of texts",
        "Llama-2-7B at 1 bit, WikiText alone: WikiText 10.34, C4 23.23, zero-shot 48.68; three "
        "quarters C4: 11.42, 16.25, 50.87. More text is the cheapest gain (512 windows instead of "
        "128: 9.07)",
        f"{PAPER}, Tables 9 and 10",
    )


def dense_model_needed(case: Case) -> Applied | None:
    """To make a quantized model, the dense one has to go through memory."""
    if not case.ours:
        return None
    return Applied(
        "making it takes the dense model",
        f"nanoquant quantize holds the {amount(case.table.model.dense_bytes)} of the dense "
        "model in memory, and more, on the machine that quantizes (importance.curvature inputs alone "
        "4 bytes for every pair of a linear's inputs); the published 70B run took 13 "
        "hours of one H100",
        f"{PAPER}, cost of compression; nanoquant/quantize.py",
    )


RULES: tuple[Callable[[Case], Applied | None], ...] = (
    mathematics,
    code,
    long_context,
    smaller_at_more_bits,
    one_bit,
    below_one_bit,
    two_bits,
    two_methods,
    embedding_share,
    groups_left_dense,
    padded_rows,
    cache_dominates,
    prompt_in_pieces,
    post_trained,
    calibration_mix,
    dense_model_needed,
)


def applied(case: Case) -> list[Applied]:
    """The rules that apply to a case, in order."""
    return [found for rule in RULES if (found := rule(case)) is not None]
