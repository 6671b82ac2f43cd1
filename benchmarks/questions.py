"""More questions of the kinds that the shipped chats have, for the embedded target to answer.

    python benchmarks/questions.py --out questions.jsonl
    eagle3-xla regenerate --target quickstart/target --chats questions.jsonl --out chats --max-tokens 256

The words of the shipped questions in another of their sentences, and further functions of this Python's standard
library, each with its docstring. None has a word, a definition or a function that a held-out question has, and none is
shipped.
"""

import argparse
import ast
import json
import random
import re
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

CHATS = Path(__file__).parents[1] / "src/eagle3_xla/data/chats"
ABOUT_A_WORD = """\
Can you tell me about the history of {}?
Explain {} to a ten-year-old child.
Give me three interesting facts about {}.
How would you describe {} to someone who has never seen or heard of it?
I am curious about {}. Where do I start?
List five words related to {} and explain each one.
What are the advantages and disadvantages of {}?
What is {}?
What should a beginner know about {}?
Why might {} be important in everyday life?
Write a blog post introduction on the topic of {}.
Write a paragraph that uses the word "{}" and explain what it means.
Write a short dialogue between two friends who talk about {}.
Write a short poem about {}.
Write a short story about {}.
Write an email to a colleague about {}.""".splitlines()
ABOUT_TWO_WORDS = ("Compare {} with {} in a few sentences.", "What is the difference between {} and {}?")
ABOUT_A_DEFINITION = (
    'Here is a definition: "{}". Which word does it define, and how is it used?',
    'Rewrite the following sentence in simpler English: "{}"',
)
ABOUT_A_FUNCTION = (
    'Complete this Python function.\n\ndef {name}({arguments}):\n    """{doc}"""',
    'Explain with an example what this Python function does.\n\ndef {name}({arguments}):\n    """{doc}"""',
    "Write a Python function `{name}({arguments})` that does the following: {doc}",
)
SHORTEST, LONGEST = 15, 250  # characters of a docstring, about those of the shipped questions
NOT_LIBRARY = {"site-packages", "test", "tests", "idle_test", "__pycache__", "turtledemo", "lib2to3"}


def read_questions(name: str) -> list[str]:
    return [json.loads(line)["conversations"][0]["value"] for line in (CHATS / name).read_text().splitlines()]


def parts_of(questions: list[str], sentences: tuple[str, ...] | list[str]) -> list[tuple[str, ...]]:
    """What stands in the gaps of those of the questions that are one of the sentences, the first that fits."""
    patterns = [re.compile("(.+)".join(re.escape(part) for part in sentence.split("{}"))) for sentence in sentences]
    found = (next(filter(None, (pattern.fullmatch(question) for pattern in patterns)), None) for question in questions)
    return [match.groups() for match in found if match]


def words_of(questions: list[str]) -> set[str]:
    return {word for parts in parts_of(questions, [*ABOUT_TWO_WORDS, *ABOUT_A_WORD]) for word in parts}


def functions() -> Iterator[tuple[str, str, str]]:
    """(name, arguments, docstring on one line) of the standard library's public functions that have one."""
    root = Path(sysconfig.get_path("stdlib"))
    for file in sorted(root.rglob("*.py")):
        if NOT_LIBRARY & set(file.relative_to(root).parts):
            continue
        try:
            tree = ast.parse(file.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):  # templates of lib2to3's kind
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                doc = " ".join((ast.get_docstring(node) or "").split())
                if SHORTEST <= len(doc) <= LONGEST:
                    given = node.args
                    arguments = [a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
                    yield node.name, ", ".join(arguments), doc


def about_functions(chance: random.Random, kept_out: list[str]) -> list[str]:
    """A question about each function of which no held-out question has the name or the docstring."""
    heldout = " ".join(" ".join(kept_out).split())
    names = set(re.findall(r"(\w+)\(", heldout))
    by_doc = {doc: (name, arguments) for name, arguments, doc in functions()}
    return [
        chance.choice(ABOUT_A_FUNCTION).format(name=name, arguments=arguments, doc=doc)
        for doc, (name, arguments) in by_doc.items()
        if name not in names and doc not in heldout
    ]


def about_words(chance: random.Random, shipped: list[str], kept_out: list[str]) -> list[str]:
    """Each word and definition of the shipped questions in sentences drawn anew, two for a word."""
    words = sorted(words_of(shipped) - words_of(kept_out))
    questions = [chance.choice(ABOUT_A_WORD).format(word) for word in words for _ in range(2)]
    questions += [chance.choice(ABOUT_TWO_WORDS).format(*chance.sample(words, 2)) for _ in range(len(words) // 8)]
    definitions = {part for (part,) in parts_of(shipped, ABOUT_A_DEFINITION)}
    definitions -= {part for (part,) in parts_of(kept_out, ABOUT_A_DEFINITION)}
    return questions + [sentence.format(part) for part in sorted(definitions) for sentence in ABOUT_A_DEFINITION]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--of-each", type=int, default=1600, help="questions about words, and about functions")
    arguments = parser.parse_args()
    chance = random.Random(arguments.seed)
    shipped, kept_out = read_questions("train.jsonl"), read_questions("heldout.jsonl")
    known = {*shipped, *kept_out}
    questions = []
    kinds = {"words": about_words(chance, shipped, kept_out), "python-stdlib": about_functions(chance, kept_out)}
    for source, of_it in kinds.items():
        new = [question for question in dict.fromkeys(of_it) if question not in known]
        drawn = chance.sample(new, min(arguments.of_each, len(new)))
        print(f"{source}: {len(drawn)} of {len(new)}", file=sys.stderr)
        questions += [(source, question) for question in drawn]
    chance.shuffle(questions)
    with arguments.out.open("w") as file:
        for source, question in questions:
            chat = {"source": source, "conversations": [{"from": "human", "value": question}]}
            file.write(json.dumps(chat) + "\n")


if __name__ == "__main__":
    main()
