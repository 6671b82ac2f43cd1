"""The settings of the data: where conversations come from, which are kept, how they become rows."""

import re
from dataclasses import dataclass, field

from eagle3_xla.errors import UserError
from eagle3_xla.settings import setting


@dataclass
class Source:
    """Where conversations come from. A plain string in a recipe is a source with that path."""

    path: str = ""  # a JSONL, JSON or Parquet file or folder, a URL, a hub id, sharegpt | ultrachat | perfectblend
    name: str = ""  # in manifest and held-out figures; default: each row's own `source`, else the file's name
    share: float = setting(0.0, within="[0, inf)")  # relative part of data.conversations; 0: everything
    cap: int = setting(0, within="[0, inf)")  # at most so many conversations of it; 0: no cap
    # stop after so many rows (a hub set without `file` is shuffled as it streams); 0: all rows
    read: int = setting(0, within="[0, inf)")
    config: str = ""  # hub sets and folders: which of their configurations, where they have several
    split: str = "train"  # hub sets and folders
    file: str = ""  # hub sets and folders: this file of it, whatever its split
    revision: str = ""  # hub sets: a commit, tag or branch


@dataclass
class DataConfig:
    train: list[Source] = field(default_factory=list)  # sources of the training conversations
    heldout: list[Source] = field(default_factory=list)  # empty: heldout_share of the training conversations
    # of the training conversations, when there is no heldout source
    heldout_share: float = setting(0.02, within="[0, 1)")
    prepared: str = setting("", free=True)  # folder (or gs:// URL) that `prepare` writes and `train` reads
    conversations: int = setting(0, within="[0, inf)")  # size of the mix when the sources have shares
    # near: also near-duplicates (MinHash, Jaccard 0.8)
    deduplicate: str = setting("near", among=("near", "exact", "none"))
    decontaminate: list[str] = field(default_factory=list)  # files of evaluation prompts, kept out of the training data
    languages: list[str] = field(default_factory=list)  # ISO codes to keep, [en] for one; empty: all
    tool_turns: str = setting("drop", among=("drop", "keep"))  # drop: conversations with tool turns are left out
    # drop: conversations marked `"finish": "length"` are left out
    truncated_answers: str = setting("keep", among=("keep", "drop"))
    last_turn_only: bool = False  # train on the last answer of each conversation alone
    # share of conversations without the template's default system prompt
    drop_system: float = setting(0.0, within="[0, 1]")
    # share of conversations with one of system_prompts instead of it
    vary_system: float = setting(0.0, within="[0, 1]")
    system_prompts: list[str] = field(  # what vary_system draws from
        default_factory=lambda: [
            "You are a helpful assistant.",
            "You are a knowledgeable assistant. Answer truthfully and to the point.",
            "Answer the user's questions.",
            "You are an expert who explains things clearly.",
        ]
    )
    row_length: int = setting(1024, within="[8, 131072]")  # tokens in a row, at most the context of the target
    # packed: several conversations in a row | bucketed: one, in the shortest row that holds it
    packing: str = setting("packed", among=("packed", "bucketed"))
    buckets: list[int] = field(default_factory=list)  # row lengths besides row_length when bucketed
    # cut: a conversation longer than a row ends within a turn | turn: after its last whole answer
    too_long: str = setting("cut", among=("cut", "turn"))
    # tokens the head can draft: the commonest of the training answers
    draft_vocab_size: int = setting(32000, within="[1, inf)")
    # stop after so many training tokens (in a seeded order of the chats); 0: all
    max_tokens: int = setting(0, within="[0, inf)")
    seed: int = setting(0, within="[0, inf)")  # of the order of the chats, the mix and the held-out share
    # processes; 0: one per core. The result does not depend on it
    workers: int = setting(0, within="[0, 1024]", free=True)

    def check(self) -> None:
        """Raises UserError for settings that don't go together."""
        for key in ("train", "heldout"):
            for number, source in enumerate(getattr(self, key)):
                if not source.path:
                    raise UserError(f"setting data.{key}[{number}].path is empty; name a file, folder, URL or hub id")
                if source.config and source.file:
                    raise UserError(
                        f"setting data.{key}[{number}] has config {source.config!r} and file {source.file!r}; a file "
                        "is read whatever its configuration: leave one out"
                    )
        for number, source in enumerate(self.heldout):
            if source.share:
                raise UserError(
                    f"setting data.heldout[{number}].share is {source.share:g}; shares are of the training mix: give a "
                    "held-out source a cap"
                )
        shares = [source.share for source in self.train]
        if any(shares) and not all(shares):
            missing = self.train[shares.index(0)].path
            raise UserError(
                f"setting data.train: {missing} has no share, but other sources have; give each of them one"
            )
        if self.conversations and not any(shares):
            raise UserError(
                f"data.conversations is {self.conversations} (perhaps the recipe's), but no source has a share: give "
                "each a share, or --data.conversations=0"
            )
        if any(shares) and not self.conversations:
            raise UserError("setting data.train: its sources have shares; of how many, say in data.conversations")
        for code in self.languages:
            if not re.fullmatch("[a-z]{2,3}", code):
                raise UserError(f"setting data.languages has {code!r}; codes such as en are expected (in YAML: 'no')")
        if not all(self.decontaminate):
            raise UserError("setting data.decontaminate names an empty path; name files of evaluation prompts")
        if self.drop_system + self.vary_system > 1:
            raise UserError("settings data.drop_system and data.vary_system are shares; their sum must be at most 1")
        if self.buckets and self.packing != "bucketed":
            raise UserError(
                f"setting data.buckets is {self.buckets}, which data.packing={self.packing} has no use for; set "
                "data.packing to bucketed, or data.buckets to []"
            )
        if not all(8 <= length < self.row_length for length in self.buckets):
            raise UserError(
                f"setting data.buckets is {self.buckets}; lengths from 8 to below data.row_length are expected"
            )
        if self.vary_system and not self.system_prompts:
            raise UserError("setting data.vary_system is set, but data.system_prompts is empty")
