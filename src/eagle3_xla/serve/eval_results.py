"""`.eval_results/`: a head's acceptance lengths as the hub keeps scores of benchmarks.

The format is that of huggingface.co/docs/hub/eval-results, which huggingface_hub has a class for (EvalResultEntry) from
version 1.4 on only. A score has no name of its metric there and joins the leaderboard of its dataset, so only the user
can say that a benchmark's values are acceptance lengths: beside accuracies they would be wrong.
"""

import re

from eagle3_xla.errors import UserError
from eagle3_xla.evaluate.results import Figures

PLACE = ".eval_results/acceptance_length.yaml"
FIRST_LINE = "# Acceptance lengths, written by eagle3-xla push: https://huggingface.co/docs/hub/eval-results"


def eval_results(results: list[Figures], benchmarks: list[str], repo: str) -> str:
    """The file's content, "" without benchmarks.

    benchmarks: PROMPTS=OWNER/NAME:TASK, the name of a result's prompts, the benchmark's dataset on the hub and its task
    by the dataset's eval.yaml. Raises UserError for one that is none, or that no result has prompts of.
    """
    import yaml

    entries: list[dict] = []
    for benchmark in benchmarks:
        match = re.fullmatch(r"(.+)=([\w.-]+/[\w.-]+):([\w.-]+)", benchmark, re.ASCII)
        if match is None:
            raise UserError(f"--benchmark {benchmark}: PROMPTS=OWNER/NAME:TASK is expected")
        prompts, dataset, task = match.groups()
        measured = [row for row in results if row.prompts_name == prompts]
        if not measured:
            there = ", ".join(sorted({row.prompts_name for row in results}))
            raise UserError(f"--benchmark {benchmark}: the results are of other prompts ({there})")
        entries += [
            {
                "dataset": {"id": dataset, "task_id": task},
                "value": round(row.tau, 3),
                "date": row.date,
                "source": {"url": f"https://huggingface.co/{repo}", "name": "Model card"},
                "notes": f"acceptance length, {row.how}",
            }
            for row in measured
        ]
    return f"{FIRST_LINE}\n{yaml.safe_dump(entries, sort_keys=False)}" if entries else ""
