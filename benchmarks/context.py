"""Acceptance by the length of the context, of a head as it is and where it sees the last positions only.

    python benchmarks/context.py --target DIR --draft DIR [--lengths 256,1024,4096] [--windows 0,256] [--prompts 8]

The prompts are held-out questions below as much other held-out text as the length wants. A window of 0 is the whole
context (`eval --draft-window`).
"""

import argparse

from eagle3_xla.data.files import data_file, read_rows
from eagle3_xla.data.tokenizer import load_tokenizer, stop_token_ids
from eagle3_xla.evaluate.options import EvalOptions
from eagle3_xla.evaluate.run import decode_all, load_pair, tau, template_ids

BATCH = 2  # prompts at once: the caches of 16 long ones would take gigabytes


def texts() -> list[tuple[str, str]]:
    """(question, answer) of the held-out chats' first turns."""
    rows = [row["conversations"] for _, row in read_rows(data_file("package:heldout.jsonl"))]
    said = [[turn["value"] for turn in turns if turn["from"] != "system"][:2] for turns in rows]
    return [(question, answer) for question, answer in said]


def prompts(tokenizer, length: int, number: int) -> list[str]:
    """Questions, each below other chats' texts: about `length` tokens together."""
    chats, made = texts(), []
    for i in range(number):
        before, others = "", 1
        while len(tokenizer(before)["input_ids"]) < length:
            question, answer = chats[(i + others) % len(chats)]
            before, others = f"{before}{question}\n{answer}\n\n", others + 1
        ids = tokenizer(before)["input_ids"]
        made.append(tokenizer.decode(ids[len(ids) - length :]) + "\n\n" + chats[i][0])
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True)
    parser.add_argument("--draft", required=True)
    parser.add_argument("--lengths", default="256,1024,4096")
    parser.add_argument("--windows", default="0,256")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    arguments = parser.parse_args()
    tokenizer = load_tokenizer(arguments.target)
    windows = [int(window) for window in arguments.windows.split(",")]
    print("| tokens of context | " + " | ".join(f"window {window or 'none'}" for window in windows) + " |")
    print("|---" * (1 + len(windows)) + "|")
    for length in map(int, arguments.lengths.split(",")):
        chats = [[{"role": "user", "content": text}] for text in prompts(tokenizer, length, arguments.prompts)]
        reached = []
        for window in windows:
            options = EvalOptions(max_new_tokens=arguments.max_new_tokens, draft_window=window, batch_size=BATCH)
            pair = load_pair(arguments.target, arguments.draft, options)
            longest = pair.model.config.max_position_embeddings
            ids = template_ids(tokenizer, f"{length:,} tokens of context", chats, options, longest)
            reached.append(tau(decode_all(pair, ids, stop_token_ids(arguments.target, tokenizer), options)))
        print(f"| {length:,} | " + " | ".join(f"{x:.3f}" for x in reached) + " |", flush=True)


if __name__ == "__main__":
    main()
