"""Made-up text of the small tokenizer and data directory; a module of its own, as several files are named conftest."""

import random

VOCABULARY = """the a small llama model token shard reads writes learns step loss rate rank batch gradient weight norm
layer attention head query key value rope cosine sine floor peak data order seed epoch sample document source code"""


def made_up_text(seed: int, words: int) -> str:
    """Sentences and lines of code that a small model can learn something from."""
    rng, vocabulary = random.Random(seed), VOCABULARY.split()
    lines = []
    while words > 0:
        count = rng.randint(3, 12)
        line = " ".join(rng.choices(vocabulary, k=count))
        indent = "    " * rng.randint(0, 2)
        lines.append(f"{indent}{line} = {rng.randint(0, 999)}" if rng.random() < 0.3 else f"{line}.")
        words -= count
    return "\n".join(lines)
