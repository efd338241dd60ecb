"""The prompts of the grammar: how long they are, how many words they use, and how fast they are composed.

    python benchmarks/prompts.py                       # 100,000 prompts, about 20 seconds
    python benchmarks/prompts.py --quick --json prompts.json
    python benchmarks/prompts.py --count 50 --show 50  # samples to read

Lengths are in words, between blanks. A distinct word is counted once in all its spellings with capitals. Repeated
candidates were composed before and left out. Seconds are of the CPU; memory is the peak of the process.
"""

import argparse
import json
import re
import resource
import sys
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from wanlite.data.grammar import compose, varied_prompts
from wanlite.data.grammar.english import words_of

RANGES = ((1, 1), (2, 5), (6, 12), (13, 25), (26, 50), (51, 80), (81, None))
QUOTED = re.compile(r'"([^"]+)"')


def measure(count, seed):
    """Return the figures of `count` prompts, and the prompts."""
    start = time.process_time()
    prompts = varied_prompts(seed, count)
    seconds = time.process_time() - start
    words = Counter(word for prompt in prompts for word in words_of(prompt))
    lengths = [len(prompt.split()) for prompt in prompts]
    figures = {
        "prompts": count,
        "seed": seed,
        "mean_words": round(sum(lengths) / count, 1),
        "most_words": max(lengths),
        "distinct_words": len(words),
        "words_in_ten_prompts": sum(number >= 10 for number in words.values()),
        "distinct_lettering": len({text for prompt in prompts for text in QUOTED.findall(prompt)}),
        "repeated_candidates": repeated(prompts, seed),
        "seconds": round(seconds, 1),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "lengths": [share(prompts, lengths, *bounds) for bounds in RANGES],
    }
    return figures, prompts


def repeated(prompts, seed):
    """Return how many candidates were left out, each the repetition of an earlier one."""
    last = prompts[-1]
    index = len(prompts) - 1
    while compose(seed, index) != last:
        index += 1
    return index + 1 - len(prompts)


def share(prompts, lengths, fewest, most):
    """Return the row of the prompts whose number of words is within bounds."""
    found = [prompt for prompt, length in zip(prompts, lengths) if fewest <= length <= (most or length)]
    name = f"{fewest} to {most}" if most and most > fewest else f"{fewest}" if most else f"{fewest} and more"
    percent = round(100 * len(found) / len(prompts), 1)
    return {"words": name, "percent": percent, "distinct_words": len({w for p in found for w in words_of(p)})}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=100_000, metavar="N", help="prompts (default: 100000)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the grammar (default: 0)")
    parser.add_argument("--show", type=int, default=0, metavar="N", help="print the first N (default: 0)")
    parser.add_argument("--quick", action="store_true", help="2,000 prompts")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    options = parser.parse_args()
    figures, prompts = measure(2000 if options.quick else options.count, options.seed)
    for prompt in prompts[: options.show]:
        print(prompt)
    print(f"{'words':<12} {'share':>7} {'distinct words':>15}")
    for row in figures["lengths"]:
        print(f"{row['words']:<12} {row['percent']:>6} % {row['distinct_words']:>14,}")
    print(", ".join(f"{name} {value}" for name, value in figures.items() if name != "lengths"))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
