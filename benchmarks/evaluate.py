"""Tokens per second of `eval`'s decoding: prompts one at a time and several at once, with and without the head.

    OMP_NUM_THREADS=1 python benchmarks/evaluate.py --target quickstart/target --draft quickstart/head

The same prompts are decoded in each way, the ways in turns in one process, `--repeats` times; the median counts.
Seconds are those of decoding, prefill apart, which is how `eval` counts. "other answers": prompts whose tokens are not
those of the target alone, one at a time (rounding of differently shaped products can turn a close choice).
"""

import argparse
from dataclasses import replace
from statistics import median

from eagle3_xla.data.tokenizer import load_tokenizer, stop_token_ids
from eagle3_xla.evaluate.decode import Decoder, Generation
from eagle3_xla.evaluate.options import EvalOptions
from eagle3_xla.evaluate.run import decode_all, decode_prompts, load_pair, prompt_ids, speed, tau


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True)
    parser.add_argument("--draft", required=True)
    parser.add_argument("--prompts", default="package:heldout.jsonl")
    parser.add_argument("--limit", type=int, default=40)
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--draft-tokens", type=int, default=5)
    parser.add_argument("--batch-sizes", default="1,4,16,32")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()

    options = EvalOptions(
        limit=arguments.limit, max_new_tokens=arguments.max_new_tokens, draft_tokens=arguments.draft_tokens
    )
    pair = load_pair(arguments.target, arguments.draft, options)
    tokenizer = load_tokenizer(arguments.target)
    ids = prompt_ids(tokenizer, arguments.prompts, options, pair.model.config.max_position_embeddings)
    stop_ids = stop_token_ids(arguments.target, tokenizer)
    target, _ = pair.on(options)
    sizes = [int(size) for size in arguments.batch_sizes.split(",")]

    answers: dict[tuple[bool, int], list[list[Generation]]] = {}
    for _ in range(arguments.repeats):
        for size in sizes:
            shape = replace(options, batch_size=size)
            plain = decode_prompts(Decoder(target, size), ids, stop_ids, shape)
            answers.setdefault((False, size), []).append(plain)
            answers.setdefault((True, size), []).append(decode_all(pair, ids, stop_ids, shape))

    expected = [answer.tokens for answer in answers[False, sizes[0]][0]]
    print(
        "| prompts at once | head | tokens/s | against one at a time | tau | other answers |\n|---|---|---|---|---|---|"
    )
    for head in (False, True):
        for size in sizes:
            runs = answers[head, size]
            gains = [speed(run) / speed(alone) for run, alone in zip(runs, answers[head, sizes[0]])]
            others = sum(answer.tokens != tokens for answer, tokens in zip(runs[0], expected))
            print(
                f"| {size} | {'yes' if head else 'no'} | {median(map(speed, runs)):.1f} | {median(gains):.2f} "
                f"({min(gains):.2f} to {max(gains):.2f}) | {tau(runs[0]):.3f} | {others} |"
            )


if __name__ == "__main__":
    main()
