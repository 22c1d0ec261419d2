"""Choose bits for a memory of 8 GB: what fits, what to take, what quantizing it would take.

    python tutorials/bits_for_8gb.py

No weight is read: shapes come from the configuration of a published model. The commands `nanoquant advise` and
`nanoquant estimate` print the same; here the figures are at hand in Python.
"""

from nanoquant.console import quiet

quiet()  # before the imports that bring torchao along, which tells of libraries for other machines
import torch  # noqa: E402

from nanoquant.advice.catalogue import find  # noqa: E402
from nanoquant.advice.config import AdviceConfig  # noqa: E402
from nanoquant.advice.recommend import advise  # noqa: E402
from nanoquant.config import nanoquant_config  # noqa: E402
from nanoquant.estimate.command import find_subject  # noqa: E402
from nanoquant.estimate.estimate import make_estimate  # noqa: E402
from nanoquant.estimate.request import EstimateConfig  # noqa: E402

GB = 1e9
MODELS = ("qwen3-14b", "llama-3.1-70b")


def options(name, task="chat"):
    """The advice for a model in 8 GB on a GPU at 4096 tokens."""
    asked = AdviceConfig(memory="8GB", context=4096, task=task, device="cuda")
    named = find(name)
    positions = named.config.max_position_embeddings
    return advise(named, asked.task, asked.use(positions, name), asked.bytes())


def main():
    # 1. What fits. Weights are what bits decide; the cache of keys and values and the activations come on top, and a
    # row that fits with less than a tenth to spare is tight.
    advice = options("llama-3.1-8b")
    print("llama-3.1-8b                 weights  cache  total, GB  fits")
    for row in advice.table.rows:
        if row.option.embedding == 16:
            cost = row.cost
            sizes = f"{cost.weights / GB:7.2f}  {cost.cache / GB:5.2f}  {cost.total / GB:9.2f}"
            print(f"{row.option.label:28} {sizes}  {row.fits}")

    print(f"recommended: {advice.recommended.row.option.name}")

    # 2. What to take. Where 4 bits fit, take 4 bits: they lose little, and this library begins where they end. Below
    # that the advisor compares with a smaller model of the family at more bits, often the better use of memory.
    for name in MODELS:
        for task in ("chat", "math"):
            advice = options(name, task)
            choice = advice.recommended
            best = (
                "nothing that fits"
                if choice is None
                else f"{choice.row.model} at {choice.row.option.name}"
            )
            print(f"\n{name} for {task}: {best}")
            print(f"  {advice.reasons[0]}")

    # 3. The other way round: the size of the file is given, the bits follow. Embedding and head stay at 16 bits unless
    # `embedding` says otherwise, and they weigh most where the vocabulary is large and the model small.
    request = EstimateConfig(source="qwen3-14b", machine="h100", eval_windows=0)
    print("\nqwen3-14b, file  embedding bits  bits a weight of the linears")
    subject = find_subject(request.source, nanoquant_config())
    for file, bits in (("5GB", 16), ("5GB", 8), ("3.5GB", 8)):
        config = nanoquant_config(budget={"file": file}, embedding={"bits": bits})
        found = make_estimate(subject, config, request, base=0, device=torch.device("cpu"))
        print(f"{file:15}  {bits:14}  {found.sizes[0].config.budget.bits:28.2f}")

    # 4. What the last one takes on a GPU whose rates are assumed, so hours are between two bounds.
    print("\nphase            GB on the GPU")
    for need in found.needs:
        print(f"{need.phase:15}  {need.bytes(device=True) / GB:13.1f}")
    low, high = (sum(bound) / 3600 for bound in zip(*found.seconds.values(), strict=True))
    print(f"{low:.1f} to {high:.1f} hours on one H100")


if __name__ == "__main__":
    main()
