"""The drafts of one round as a tree."""

from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass
class Tree:
    """Drafts of one round. Node 0 is the last known token; a node's parent comes before it."""

    tokens: list[int]
    parents: list[int] = field(default_factory=lambda: [-1])
    scores: list[float] = field(default_factory=lambda: [0.0])  # log-probability of the path from the root

    def add(self, token: int, parent: int, log_probability: float) -> int:
        self.tokens.append(token)
        self.parents.append(parent)
        self.scores.append(self.scores[parent] + log_probability)
        return len(self.tokens) - 1

    def path(self, node: int) -> list[int]:
        """The nodes from the root to `node`."""
        return [*self.path(self.parents[node]), node] if node >= 0 else []

    def best(self, nodes: Iterable[int], count: int) -> list[int]:
        """The likeliest `count` of these nodes; of equal ones the first, so a parent is never worse than its child."""
        return sorted(nodes, key=lambda node: -self.scores[node])[:count]

    def pruned(self, drafts: int) -> "Tree":
        """The likeliest `drafts` nodes besides the root."""
        kept = [0, *sorted(self.best(range(1, len(self.tokens)), drafts))]
        place = {node: i for i, node in enumerate(kept)} | {-1: -1}
        parents = [place[self.parents[node]] for node in kept]
        return Tree([self.tokens[node] for node in kept], parents, [self.scores[node] for node in kept])

    def visible(self, nodes: list[int], others: list[int]) -> list[list[bool]]:
        """[nodes, others]: whether the other one is the node itself or above it."""
        paths = [{*self.path(node)} for node in nodes]
        return [[other in path for other in others] for path in paths]
